#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace dattn {

/// The header of a NumPy file: what its data is and where it begins. Always C order, little endian.
struct NpyHeader {
  enum class Type { f2, f4, f8, i4, i8 };

  Type type = Type::f4;
  std::vector<std::int64_t> shape;  ///< 1 to 8 extents, each >= 0.
  std::int64_t data_offset = 0;     ///< First byte of the data in the file.
};

/// What a file may hold: floats of 2, 4 or 8 bytes, signed integers of 4 or 8, or either.
enum class NpyKind { floats, integers, numbers };

/// Bytes of one element.
std::int64_t npy_item_bytes(NpyHeader::Type type);

/// The largest number of bytes that parse_npy_header looks at: 12 of prefix and a 1 MiB header.
inline constexpr std::int64_t npy_header_limit = 12 + (std::int64_t{1} << 20);

/// Parses the first bytes of a file of `file_size` bytes; `name` is the path, for messages only.
/// `first_bytes` holds the first min(file_size, npy_header_limit) bytes. Throws
/// Failure(Exit::input) unless header and file size agree to the byte and the elements are of
/// `kind`.
NpyHeader parse_npy_header(std::span<const std::byte> first_bytes, std::int64_t file_size,
                           const std::string& name, NpyKind kind = NpyKind::floats);

/// The bytes that numpy.save puts before the data of a C-ordered array (format 1.0).
/// @pre 1 to 8 extents, each >= 0
std::string npy_header(NpyHeader::Type type, std::span<const std::int64_t> shape);

/// The float with the same value as an IEEE half; exact, subnormals, infinities and NaN included.
float half_to_float(std::uint16_t half);

/// A NumPy file open for reading. Threads may read at the same time.
/// It reads and never maps: a file that shrinks meanwhile then gives a Failure and not a SIGBUS.
class NpyReader {
 public:
  /// Opens and checks `path`; Failure(Exit::input) if it is not a NumPy file we can use.
  explicit NpyReader(std::string path, NpyKind kind = NpyKind::floats);
  NpyReader(NpyReader&& other) noexcept;
  NpyReader& operator=(NpyReader&& other) noexcept;
  ~NpyReader();

  const NpyHeader& header() const { return header_; }
  const std::string& path() const { return path_; }

  /// The extent of dimension 0.
  std::int64_t rows() const { return header_.shape[0]; }

  /// Elements of one row: the product of all other extents.
  std::int64_t row_size() const { return row_size_; }

  /// Copies rows first, first + step, ... to `out`, `count` of them, converted to T (float,
  /// double; std::int64_t from integers only). Uses at most 8 MiB of its own; a file that became
  /// shorter is a Failure(Exit::input).
  /// @pre first, count >= 0, step >= 1, all those rows exist, out holds count * row_size()
  template <class T>
  void read_rows(std::int64_t first, std::int64_t count, std::int64_t step, T* out) const;

  /// Copies elements [first, first + count) of one row to `out`, converted.
  /// @pre the row exists and has them
  void read_part(std::int64_t row, std::int64_t first, std::int64_t count, float* out) const;

  /// Copies the bytes of rows first, first + 1, ... as they are; as many as fill `out`.
  /// @pre those rows exist, and `out` holds whole rows
  void read_row_bytes(std::int64_t first, std::span<std::byte> out) const;

 private:
  template <class T>
  void read_elements(std::int64_t first, std::int64_t count, T* out) const;
  void read_bytes(std::int64_t offset, std::span<std::byte> out) const;

  std::string path_;
  int file_ = -1;
  NpyHeader header_;
  std::int64_t row_size_ = 0;
};

}  // namespace dattn
