#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <type_traits>
#include <utility>

#include "launcher/failure.hpp"
#include "launcher/npy.hpp"

namespace dattn {
namespace {

static_assert(std::endian::native == std::endian::little, "npy data is copied without byte swaps");

constexpr std::int64_t buffer_bytes = std::int64_t{4} << 20;

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Failure(Exit::input, quoted_path(path) + ": " + what);
}

[[noreturn]] void refuse_errno(const std::string& path, const std::string& what) {
  refuse(path, what + ": " + std::strerror(errno) + "; fix: check the path and its permissions");
}

template <class From, class T>
void convert(const std::byte* raw, std::int64_t count, T* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    From value;
    std::memcpy(&value, raw + i * static_cast<std::int64_t>(sizeof value), sizeof value);
    if constexpr (std::is_same_v<From, std::uint16_t>) {
      out[i] = static_cast<T>(half_to_float(value));
    } else {
      out[i] = static_cast<T>(value);
    }
  }
}

template <class T>
void convert(NpyHeader::Type type, const std::byte* raw, std::int64_t count, T* out) {
  switch (type) {
    case NpyHeader::Type::f2:
      return convert<std::uint16_t>(raw, count, out);
    case NpyHeader::Type::f4:
      return convert<float>(raw, count, out);
    case NpyHeader::Type::f8:
      return convert<double>(raw, count, out);
    case NpyHeader::Type::i4:
      return convert<std::int32_t>(raw, count, out);
    case NpyHeader::Type::i8:
      return convert<std::int64_t>(raw, count, out);
  }
}

}  // namespace

NpyReader::NpyReader(std::string path, NpyKind kind) : path_(std::move(path)) {
  // O_NONBLOCK because opening a FIFO would otherwise wait for its writer.
  file_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (file_ < 0) refuse_errno(path_, "cannot be opened");
  try {
    struct stat info = {};
    if (::fstat(file_, &info) != 0) refuse_errno(path_, "cannot be examined");
    if (S_ISDIR(info.st_mode)) refuse(path_, "is a directory; fix: name a .npy file in it");
    if (!S_ISREG(info.st_mode)) {
      refuse(path_, "is a pipe or device; fix: copy the data into a regular .npy file");
    }
    std::vector<std::byte> first(
        static_cast<std::size_t>(std::min<std::int64_t>(info.st_size, npy_header_limit)));
    read_bytes(0, first);
    header_ = parse_npy_header(first, info.st_size, path_, kind);
  } catch (...) {
    ::close(file_);
    throw;
  }
  row_size_ = 1;
  for (const std::int64_t extent : std::span(header_.shape).subspan(1)) row_size_ *= extent;
}

NpyReader::NpyReader(NpyReader&& other) noexcept
    : path_(std::move(other.path_)),
      file_(std::exchange(other.file_, -1)),
      header_(std::move(other.header_)),
      row_size_(other.row_size_) {}

NpyReader& NpyReader::operator=(NpyReader&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(file_, other.file_);
  std::swap(header_, other.header_);
  std::swap(row_size_, other.row_size_);
  return *this;
}

NpyReader::~NpyReader() {
  if (file_ >= 0) ::close(file_);
}

void NpyReader::read_bytes(std::int64_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t got = ::pread(file_, out.data(), out.size(), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) refuse_errno(path_, "cannot be read");
    if (got == 0) {
      refuse(path_, "changed while reading: it now ends at or before byte " +
                        std::to_string(offset) + "; fix: let nothing write to it during the run");
    }
    offset += got;
    out = out.subspan(static_cast<std::size_t>(got));
  }
}

namespace {

template <class T>
constexpr NpyHeader::Type type_of() {
  using enum NpyHeader::Type;
  return std::is_same_v<T, float> ? f4 : std::is_same_v<T, double> ? f8 : i8;
}

}  // namespace

template <class T>
void NpyReader::read_elements(std::int64_t first, std::int64_t count, T* out) const {
  const std::int64_t item = npy_item_bytes(header_.type);
  const std::int64_t offset = header_.data_offset + first * item;
  const bool same = header_.type == type_of<T>();
  if (same) {
    return read_bytes(offset,
                      std::as_writable_bytes(std::span(out, static_cast<std::size_t>(count))));
  }
  const std::int64_t part = std::min(count, buffer_bytes / item);
  std::vector<std::byte> raw(static_cast<std::size_t>(part * item));
  for (std::int64_t done = 0; done < count; done += part) {
    const std::int64_t now = std::min(part, count - done);
    read_bytes(offset + done * item, std::span(raw).first(static_cast<std::size_t>(now * item)));
    convert(header_.type, raw.data(), now, out + done);
  }
}

template <class T>
void NpyReader::read_rows(std::int64_t first, std::int64_t count, std::int64_t step, T* out) const {
  const bool floats = header_.type < NpyHeader::Type::i4;
  if (std::is_integral_v<T> && floats) {
    throw Failure(Exit::internal, "NpyReader: floats as integers, of " + quoted_path(path_));
  }
  if (first < 0 || count < 0 || step < 1 ||
      (count > 0 && (first >= rows() || (rows() - 1 - first) / step < count - 1))) {
    throw Failure(Exit::internal, "NpyReader: rows outside of " + quoted_path(path_));
  }
  if (count == 0 || row_size_ == 0) return;
  if (step == 1) return read_elements(first * row_size_, count * row_size_, out);

  const std::int64_t row_bytes = row_size_ * npy_item_bytes(header_.type);
  if (row_bytes >= 4096 || step > 16) {
    for (std::int64_t i = 0; i < count; ++i) {
      read_elements((first + i * step) * row_size_, row_size_, out + i * row_size_);
    }
    return;
  }
  // Small rows close together: one read of everything between costs less than a read per row.
  const std::int64_t part = std::min(count, buffer_bytes / (row_bytes * step));
  std::vector<std::byte> raw(static_cast<std::size_t>(((part - 1) * step + 1) * row_bytes));
  for (std::int64_t done = 0; done < count; done += part) {
    const std::int64_t now = std::min(part, count - done);
    const std::int64_t offset = header_.data_offset + (first + done * step) * row_bytes;
    const std::int64_t window = ((now - 1) * step + 1) * row_bytes;
    read_bytes(offset, std::span(raw).first(static_cast<std::size_t>(window)));
    for (std::int64_t i = 0; i < now; ++i) {
      convert(header_.type, raw.data() + i * step * row_bytes, row_size_,
              out + (done + i) * row_size_);
    }
  }
}

void NpyReader::read_part(std::int64_t row, std::int64_t first, std::int64_t count,
                          float* out) const {
  if (row < 0 || row >= rows() || first < 0 || count < 0 || first > row_size_ - count) {
    throw Failure(Exit::internal, "NpyReader: elements outside of " + quoted_path(path_));
  }
  if (count > 0) read_elements(row * row_size_ + first, count, out);
}

void NpyReader::read_row_bytes(std::int64_t first, std::span<std::byte> out) const {
  const std::int64_t row = row_size_ * npy_item_bytes(header_.type);
  if (out.empty()) return;
  if (first < 0 || std::ssize(out) % row != 0 || first > rows() - std::ssize(out) / row) {
    throw Failure(Exit::internal, "NpyReader: rows outside of " + quoted_path(path_));
  }
  read_bytes(header_.data_offset + first * row, out);
}

template void NpyReader::read_rows(std::int64_t, std::int64_t, std::int64_t, float*) const;
template void NpyReader::read_rows(std::int64_t, std::int64_t, std::int64_t, std::int64_t*) const;
template void NpyReader::read_rows(std::int64_t, std::int64_t, std::int64_t, double*) const;

}  // namespace dattn
