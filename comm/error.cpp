#include "comm/error.hpp"

#include <fmt/format.h>
#include <mpi.h>

#include <array>

namespace dattn::comm {
namespace {

struct MpiCategory final : std::error_category {
  const char* name() const noexcept override { return "mpi"; }
  std::string message(int code) const override {
    // Outside MPI_Init ... MPI_Finalize, MPI_Error_string itself would abort.
    int initialized = 0;
    int finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    std::array<char, MPI_MAX_ERROR_STRING> text{};
    int length = 0;
    if (initialized == 0 || finalized != 0 ||
        MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) {
      return fmt::format("MPI error {}", code);
    }
    return {text.data(), static_cast<std::size_t>(length)};
  }
};

}  // namespace

const std::error_category& mpi_category() noexcept {
  static const MpiCategory category;
  return category;
}

void check(int code, Place at) {
  if (code != MPI_SUCCESS) throw Error(code, fmt::format("{}:{}", at.file, at.line));
}

Timeout::Timeout(const std::string& awaited, double waited)
    : std::runtime_error(fmt::format("{}: not complete after {:.3g} s", awaited, waited)),
      seconds(waited) {}

Mismatch::Mismatch(int from, int to, std::int64_t expected_bytes, std::int64_t got_bytes,
                   bool got_more)
    : std::runtime_error(fmt::format("message from rank {} to rank {}: expected {} bytes, got {}{}",
                                     from, to, expected_bytes, got_more ? "more than " : "",
                                     got_bytes)),
      expected(expected_bytes),
      got(got_bytes) {}

}  // namespace dattn::comm
