// Its own main: what is looked at is a session's end. MPI's plugins stay where they are, since its
// threads may still be in them.

#include <fmt/format.h>
#include <link.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "comm/session.hpp"

namespace {

std::vector<std::string> libraries() {
  std::vector<std::string> names;
  const auto note = [](dl_phdr_info* library, std::size_t, void* into) {
    static_cast<std::vector<std::string>*>(into)->emplace_back(library->dlpi_name);
    return 0;
  };
  dl_iterate_phdr(note, &names);
  return names;
}

}  // namespace

int main() {
  const std::size_t at_start = libraries().size();
  std::optional<dattn::comm::Session> session(std::in_place);
  const std::vector<std::string> before = libraries();
  session.reset();
  const std::vector<std::string> after = libraries();
  int gone = 0;
  for (const std::string& name : before) {
    if (std::find(after.begin(), after.end(), name) != after.end()) continue;
    fmt::print(stderr, "{} is unloaded\n", name);
    ++gone;
  }
  if (before.size() == at_start) fmt::print("NOTE: this MPI loads no plugins\n");
  return gone == 0 ? 0 : 1;
}
