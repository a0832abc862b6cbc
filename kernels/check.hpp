#pragma once

#include <sstream>
#include <string>
#include <string_view>

namespace dattn {

/// Prints where a precondition broke and with which values, then aborts: a bug, never bad input.
[[noreturn]] void check_failed(const char* condition, const char* file, int line,
                               const std::string& values);

template <class... Values>
std::string listed(const Values&... values) {
  std::ostringstream out;
  ((out << ' ' << values), ...);
  return out.str();
}

/// `text` in quotes, fit for one line of a message: at most `most` characters of it, and only
/// printable ones (others as \xNN).
std::string shown(std::string_view text, std::size_t most = 40);

}  // namespace dattn

/// Aborts with place and values unless `cond` holds. Always on: a broken precondition is a bug.
#define CHECK(cond, ...)                                                                         \
  do {                                                                                           \
    if (!(cond)) ::dattn::check_failed(#cond, __FILE__, __LINE__, ::dattn::listed(__VA_ARGS__)); \
  } while (false)
