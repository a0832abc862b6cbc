#include "kernels/check.hpp"

#include <cstdio>
#include <cstdlib>

namespace dattn {

void check_failed(const char* condition, const char* file, int line, const std::string& values) {
  // The launcher of an MPI job tells every rank its number; plain programs have none.
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  std::fprintf(stderr, "[rank %s] bug: %s:%d: %s:%s\n", rank == nullptr ? "-" : rank, file, line,
               condition, values.c_str());
  std::abort();
}

std::string shown(std::string_view text, std::size_t most) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text.substr(0, most)) {
    if (' ' <= c && c <= '~') {
      out += c;
    } else {
      const auto byte = static_cast<unsigned char>(c);
      out += {'\\', 'x', kDigits[byte / 16u], kDigits[byte % 16u]};
    }
  }
  return out + (text.size() > most ? "...'" : "'");
}

}  // namespace dattn
