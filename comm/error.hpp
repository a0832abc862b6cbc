#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>

namespace dattn::comm {

/// The category of MPI's error codes; its messages are those of MPI_Error_string.
const std::error_category& mpi_category() noexcept;

/// A call into MPI that failed; `context` says where, or which message it was.
struct Error : std::system_error {
  Error(int code, const std::string& context) : std::system_error(code, mpi_category(), context) {}
};

/// A place in the source; std::source_location, which clang 14 lacks with libstdc++.
struct Place {
  const char* file;
  int line;
  static constexpr Place current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

/// Throws Error with the caller's place unless `code` is MPI_SUCCESS.
void check(int code, Place at = Place::current());

/// A wait that reached its deadline; what() names the peer, the bytes and the seconds waited.
struct Timeout : std::runtime_error {
  Timeout(const std::string& awaited, double seconds);
  double seconds;
};

/// A message that was shorter or longer than its receiver expected; the channel between the two
/// ranks is out of step from here on.
struct Mismatch : std::runtime_error {
  /// `got_more` means that `got` is a lower bound.
  Mismatch(int from, int to, std::int64_t expected_bytes, std::int64_t got_bytes,
           bool got_more = false);
  std::int64_t expected;
  std::int64_t got;
};

}  // namespace dattn::comm
