#include "launcher/npy.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <optional>
#include <string_view>
#include <utility>

#include "launcher/failure.hpp"

namespace dattn {
namespace {

constexpr std::size_t max_dims = 8;
constexpr std::int64_t max_header_bytes = std::int64_t{1} << 20;
constexpr std::string_view to_float32 =
    "fix: numpy.save(file, array.astype('<f4')), also '<f2' or '<f8'";
constexpr std::string_view to_int64 = "fix: numpy.save(file, array.astype('<i8')), also '<i4'";
constexpr std::array all_types{NpyHeader::Type::f2, NpyHeader::Type::f4, NpyHeader::Type::f8,
                               NpyHeader::Type::i4, NpyHeader::Type::i8};

/// As 'descr' has it, behind the byte order.
std::string_view name_of(NpyHeader::Type type) {
  constexpr std::array<std::string_view, all_types.size()> names{"f2", "f4", "f8", "i4", "i8"};
  return names[static_cast<std::size_t>(type)];
}

[[noreturn]] void refuse(const std::string& name, const std::string& what) {
  throw Failure(Exit::input, quoted_path(name) + ": " + what);
}

/// Parses the one kind of Python dictionary that NumPy writes, for example
/// {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }
class Dictionary {
 public:
  Dictionary(std::string_view text, const std::string& name, NpyKind kind)
      : text_(text), name_(name), kind_(kind) {}

  /// Fills in type and shape.
  void parse(NpyHeader& header) {
    std::optional<NpyHeader::Type> type;
    std::optional<std::vector<std::int64_t>> shape;
    bool order_given = false;
    expect('{', "the header does not start with '{'");
    while (!take('}')) {
      const std::string key = string("a key");
      expect(':', "':' is missing after the key " + in_quotes(key));
      if (key == "descr") {
        once(key, type.has_value());
        type = element_type();
      } else if (key == "fortran_order") {
        once(key, order_given);
        order_given = true;
        c_order();
      } else if (key == "shape") {
        once(key, shape.has_value());
        shape = extents();
      } else {
        bad("the header has the unknown key " + in_quotes(key));
      }
      if (take(',')) continue;
      expect('}', "',' or '}' is missing after the value of " + in_quotes(key));
      break;
    }
    skip_spaces();
    if (!text_.empty()) bad("there is more text after the closing '}' of the header");
    if (!type) bad("the header has no 'descr'");
    if (!order_given) bad("the header has no 'fortran_order'");
    if (!shape) bad("the header has no 'shape'");
    header.type = *type;
    header.shape = std::move(*shape);
  }

 private:
  [[noreturn]] void bad(const std::string& what) const {
    refuse(name_, what + "; fix: write the file with numpy.save");
  }

  void once(const std::string& key, bool seen) const {
    if (seen) bad("the header has the key " + in_quotes(key) + " twice");
  }

  void skip_spaces() {
    // The same set in every locale, so not isspace().
    text_.remove_prefix(std::min(text_.find_first_not_of(" \t\r\n\f\v"), text_.size()));
  }

  bool starts(char c) {
    skip_spaces();
    return text_.starts_with(c);
  }

  bool take(char c) {
    if (!starts(c)) return false;
    text_.remove_prefix(1);
    return true;
  }

  void expect(char c, const std::string& complaint) {
    if (!take(c)) bad(complaint);
  }

  bool take_word(std::string_view word) {
    skip_spaces();
    if (!text_.starts_with(word)) return false;
    text_.remove_prefix(word.size());
    return true;
  }

  std::string string(const std::string& what) {
    if (!starts('\'') && !starts('"')) bad("the header lacks the quoted text of " + what);
    const char quote = text_.front();
    const std::size_t end = text_.find(quote, 1);
    if (end == std::string_view::npos) bad("a quoted text in the header has no end");
    std::string value(text_.substr(1, end - 1));
    if (value.find('\\') != std::string::npos) bad("a quoted text in the header has a backslash");
    text_.remove_prefix(end + 1);
    return value;
  }

  NpyHeader::Type element_type() {
    if (starts('[') || starts('(')) {
      refuse(name_, "holds records (structured dtype), not numbers; fix: save each field alone, " +
                        std::string("numpy.save(file, array['field'])"));
    }
    const std::string descr = string("'descr'");
    for (const NpyHeader::Type type : all_types) {
      const std::string_view known = name_of(type);
      const bool wanted =
          kind_ == NpyKind::numbers || (known[0] == 'i') == (kind_ == NpyKind::integers);
      if (wanted && (descr == "<" + std::string(known) || descr == "=" + std::string(known))) {
        return type;
      }
    }
    refuse(name_, "holds " + describe(descr) + " (" + in_quotes(descr) + "), not " + wants());
  }

  std::string wants() const {
    const std::string floats = "floats of 2, 4 or 8 bytes";
    const std::string integers = "signed integers of 4 or 8 bytes";
    if (kind_ == NpyKind::floats) return floats + "; " + std::string(to_float32);
    if (kind_ == NpyKind::integers) return integers + "; " + std::string(to_int64);
    return floats + " or " + integers + "; " + std::string(to_float32);
  }

  static std::string describe(std::string_view descr) {
    if (descr == ">f2" || descr == ">f4" || descr == ">f8") return "big-endian floats";
    if (descr == "<f2" || descr == "<f4" || descr == "<f8") return "floats";
    if (descr == ">i4" || descr == ">i8") return "big-endian integers";
    const std::size_t kind = descr.find_first_not_of("<>=|");
    switch (kind == std::string_view::npos ? ' ' : descr[kind]) {
      case 'O':
        return "Python objects";
      case 'i':
        return "signed integers";
      case 'u':
        return "unsigned integers";
      case 'b':
        return "booleans";
      case 'c':
        return "complex numbers";
      case 'S':
        return "byte strings";
      case 'U':
        return "texts";
      case 'M':
        return "dates";
      case 'm':
        return "time spans";
      case 'V':
        return "raw bytes (what bfloat16 turns into when saved)";
      default:
        return "elements of an unknown type";
    }
  }

  void c_order() {
    if (take_word("True")) {
      refuse(name_, "is in Fortran order; fix: numpy.save(file, numpy.ascontiguousarray(array))");
    }
    if (!take_word("False")) bad("'fortran_order' is neither True nor False");
  }

  std::vector<std::int64_t> extents() {
    expect('(', "'shape' is not a tuple such as (2, 3)");
    std::vector<std::int64_t> shape;
    while (!take(')')) {
      shape.push_back(extent());
      if (shape.size() > max_dims) {
        refuse(name_, "has more than 8 dimensions; fix: numpy.save(file, array.reshape(...))");
      }
      if (take(',')) continue;
      if (shape.size() == 1) bad("'shape' lacks the ',' that makes it a tuple, as in (5,)");
      expect(')', "'shape' lacks ',' or ')' after a number");
      break;
    }
    if (shape.empty()) {
      refuse(name_, "holds a single number (shape ()); fix: numpy.save(file, array.reshape(1))");
    }
    return shape;
  }

  std::int64_t extent() {
    if (starts('-')) bad("'shape' has a negative number");
    // A hand-written loop: the library functions skip spaces, take signs and know locales.
    std::size_t digits = 0;
    std::int64_t value = 0;
    for (; digits < text_.size() && text_[digits] >= '0' && text_[digits] <= '9'; ++digits) {
      if (__builtin_mul_overflow(value, std::int64_t{10}, &value) ||
          __builtin_add_overflow(value, std::int64_t{text_[digits] - '0'}, &value)) {
        bad("'shape' has a number that does not fit into 64 bits");
      }
    }
    if (digits == 0) bad("'shape' has something that is not a number");
    if (digits > 1 && text_[0] == '0') bad("'shape' has a number with a leading zero");
    text_.remove_prefix(digits);
    return value;
  }

  std::string_view text_;
  const std::string& name_;
  NpyKind kind_;
};

/// Bytes of the data; zero extents count as one in the overflow check, so that every product of
/// some of the extents, a row for example, fits too.
std::int64_t data_bytes(const NpyHeader& header, const std::string& name) {
  std::int64_t bytes = npy_item_bytes(header.type);
  bool empty = false;
  for (const std::int64_t extent : header.shape) {
    empty = empty || extent == 0;
    if (__builtin_mul_overflow(bytes, std::max<std::int64_t>(extent, 1), &bytes)) {
      refuse(name, "has a 'shape' of more than 2^63 bytes; fix: write the file with numpy.save");
    }
  }
  return empty ? 0 : bytes;
}

}  // namespace

std::int64_t npy_item_bytes(NpyHeader::Type type) { return name_of(type)[1] - '0'; }

NpyHeader parse_npy_header(std::span<const std::byte> first_bytes, std::int64_t file_size,
                           const std::string& name, NpyKind kind) {
  const std::string_view bytes(reinterpret_cast<const char*>(first_bytes.data()),
                               first_bytes.size());
  const auto byte = [&](std::size_t at) {
    return std::int64_t{static_cast<unsigned char>(bytes[at])};
  };

  if (file_size == 0) refuse(name, "is empty (0 bytes); fix: write it again with numpy.save");
  if (bytes.starts_with("PK\x03\x04")) {
    refuse(name, "is a zip file (.npz); fix: save one array per file with numpy.save");
  }
  if (!bytes.starts_with("\x93NUMPY")) {
    refuse(name, "is not a NumPy file (wrong magic); fix: write it with numpy.save");
  }
  if (bytes.size() < 8) refuse(name, "ends within its first 8 bytes; fix: copy the file again");
  const std::int64_t major = byte(6);
  const std::int64_t minor = byte(7);
  if ((major != 1 && major != 2) || minor != 0) {
    refuse(name, "has npy format version " + std::to_string(major) + "." + std::to_string(minor) +
                     ", not 1.0 or 2.0; fix: numpy.save of a plain float array writes 1.0");
  }

  const std::size_t prefix = major == 1 ? 10 : 12;
  if (bytes.size() < prefix)
    refuse(name, "ends within its header length; fix: copy the file again");
  std::int64_t length = byte(8) | byte(9) << 8;
  if (major == 2) length |= byte(10) << 16 | byte(11) << 24;
  const std::int64_t end = static_cast<std::int64_t>(prefix) + length;
  if (length == 0) refuse(name, "has a header of 0 bytes; fix: write it again with numpy.save");
  if (length > max_header_bytes) {
    refuse(name, "says its header has " + std::to_string(length) +
                     " bytes, more than 1 MiB; fix: write it again with numpy.save");
  }
  if (end > file_size || end > std::ssize(bytes)) {
    refuse(name, "ends within its header, at byte " + std::to_string(file_size) + " of " +
                     std::to_string(end) + "; fix: copy the file again");
  }
  const std::string_view text = bytes.substr(prefix, static_cast<std::size_t>(length));
  if (text.back() != '\n') {
    refuse(name, "has a header that does not end in a newline; fix: write it with numpy.save");
  }

  NpyHeader header;
  Dictionary(text, name, kind).parse(header);
  header.data_offset = end;
  const std::int64_t wanted = data_bytes(header, name);
  const std::int64_t held = file_size - end;
  if (held < wanted) {
    refuse(name, "is cut short: " + std::to_string(held) + " bytes of data, 'shape' needs " +
                     std::to_string(wanted) + "; fix: copy the file again");
  }
  if (held > wanted) {
    refuse(name, "goes on after its array: " + std::to_string(held) +
                     " bytes of data, 'shape' needs " + std::to_string(wanted) +
                     "; fix: save one array per file");
  }
  return header;
}

std::string npy_header(NpyHeader::Type type, std::span<const std::int64_t> shape) {
  if (shape.empty() || shape.size() > max_dims) {
    throw Failure(Exit::internal, "npy_header: the shape has not 1 to 8 extents");
  }
  std::string text =
      "{'descr': '<" + std::string(name_of(type)) + "', 'fortran_order': False, 'shape': (";
  for (std::size_t dim = 0; dim < shape.size(); ++dim) {
    text += (dim > 0 ? ", " : "") + std::to_string(shape[dim]);
  }
  text += shape.size() == 1 ? ",), }" : "), }";
  // NumPy leaves room for the first extent to grow to 21 digits, and then pads with 1 to 64 spaces
  // (never 0) so that the data starts at a multiple of 64.
  text.append(21 - std::to_string(shape[0]).size(), ' ');
  text.append(64 - (10 + text.size() + 1) % 64, ' ');
  text += '\n';

  std::string header("\x93NUMPY\x01\x00", 8);
  header += static_cast<char>(text.size() % 256);
  header += static_cast<char>(text.size() / 256);
  return header + text;
}

float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000U) << 16U;
  const std::uint32_t exponent = (half >> 10U) & 0x1fU;
  const std::uint32_t fraction = half & 0x3ffU;
  if (exponent == 0) {
    // Zero or subnormal: fraction * 2^-24, which a float holds exactly.
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t wide = exponent == 0x1f ? 0xffU : exponent + (127 - 15);
  return std::bit_cast<float>(sign | wide << 23U | fraction << 13U);
}

}  // namespace dattn
