#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

namespace dattn {

/// What the process returns to its shell; mpirun passes the first one that is not 0 through.
enum class Exit : int {
  ok = 0,             ///< All done, and every check that was asked for passed.
  check_failed = 1,   ///< The run finished, but the numbers are wrong.
  usage = 2,          ///< An option, or a combination of options, cannot be used.
  input = 3,          ///< An input file cannot be read or is not what it should be.
  memory = 4,         ///< The run would not fit into memory, so it was not started.
  output = 5,         ///< An output file cannot be written.
  internal = 70,      ///< A bug in dattn: a broken precondition.
  corrupt = 74,       ///< Memory, the network or a file has other bytes than it had.
  timeout = 86,       ///< The watchdog ended a run that made no progress.
  interrupted = 130,  ///< SIGINT, SIGTERM, SIGHUP or SIGXCPU ended the run.
};

/// Bytes that UTF-8 needs for the printable character at the front of `text`; 0 if there is none.
/// Control characters and the Unicode line separators count as not printable.
inline std::size_t printable_prefix(std::string_view text) {
  const auto byte = [&](std::size_t at) -> unsigned {
    return at < text.size() ? static_cast<unsigned char>(text[at]) : 0U;
  };
  if (byte(0) < 0x80) return byte(0) >= 0x20 && byte(0) != 0x7f ? 1 : 0;
  const std::size_t size = byte(0) >= 0xf0 ? 4 : byte(0) >= 0xe0 ? 3 : 2;
  if (byte(0) < 0xc2 || byte(0) > 0xf4) return 0;
  unsigned point = byte(0) & (0x7fU >> size);
  for (std::size_t at = 1; at < size; ++at) {
    if ((byte(at) & 0xc0U) != 0x80) return 0;
    point = point << 6U | (byte(at) & 0x3fU);
  }
  const bool overlong = (size == 3 && point < 0x800) || (size == 4 && point < 0x10000);
  const bool surrogate = point >= 0xd800 && point < 0xe000;
  const bool breaks_line = point < 0xa0 || point == 0x2028 || point == 0x2029;
  return overlong || surrogate || breaks_line || point > 0x10ffff ? 0 : size;
}

/// `text` with everything that could break a line or a terminal written as \n, \r, \t or \xHH.
inline std::string escaped(std::string_view text) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string out;
  while (!text.empty()) {
    std::size_t size = printable_prefix(text);
    if (size > 0) {
      out += text.substr(0, size);
    } else if (const auto named = std::string_view("\n\r\t").find(text[0]);
               named != std::string_view::npos) {
      out += {'\\', "nrt"[named]};
    } else {
      const auto byte = static_cast<unsigned char>(text[0]);
      out += {'\\', 'x', digits[byte >> 4U], digits[byte & 15U]};
    }
    text.remove_prefix(size > 0 ? size : 1);
  }
  return out;
}

/// What the user wrote, in single quotes, safe to print in one line; a text of more than `limit`
/// bytes loses its middle, because a path says most at its end.
inline std::string in_quotes(std::string_view text, std::size_t limit = 60) {
  // Built by += because g++ 12 warns of an overlap in "'" + std::string that is not there.
  std::string out = "'";
  if (text.size() <= limit) return out + escaped(text) + '\'';
  std::size_t head = limit / 2;
  std::size_t tail = text.size() - (limit - head);
  const auto inside_character = [&](std::size_t at) {
    return (static_cast<unsigned char>(text[at]) & 0xc0U) == 0x80;
  };
  // At most three steps, so that a run of broken UTF-8 cannot move the cut far.
  for (int step = 0; step < 3 && head > 0 && inside_character(head); ++step) --head;
  for (int step = 0; step < 3 && tail < text.size() && inside_character(tail); ++step) ++tail;
  out += escaped(text.substr(0, head));
  out += "...";
  out += escaped(text.substr(tail));
  return out += '\'';
}

/// A path for a message: like in_quotes(), but nearly always whole.
inline std::string quoted_path(std::string_view path) { return in_quotes(path, 400); }

/// A complaint to the user: one line that names the argument or file, what is wrong, and the fix.
struct Failure : std::runtime_error {
  /// Line breaks in `line` are escaped, so the promise of one line holds for foreign texts too.
  Failure(Exit exit_code, std::string_view line)
      : std::runtime_error(escaped(line)), code(exit_code) {}

  Exit code;
};

}  // namespace dattn
