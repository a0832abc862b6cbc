#include "launcher/together.hpp"

namespace dattn {

void together(comm::Communicator& world, const std::function<void()>& part) {
  std::string report;  // exit code, a space and the line; empty when all went well
  const auto failed = [&](Exit exit, const char* what) {
    report = std::to_string(static_cast<int>(exit)) + " " + what;
  };
  try {
    part();
  } catch (const Failure& e) {
    failed(e.code, e.what());
  } catch (const std::bad_alloc&) {
    failed(Exit::memory, "out of memory; use more ranks, or ask for less");
  }
  const std::vector<std::string> all = world.all_gather(report);
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].empty()) continue;
    const std::size_t space = all[r].find(' ');
    throw JobFailure(static_cast<Exit>(std::stoi(all[r].substr(0, space))),
                     all[r].substr(space + 1), static_cast<int>(r));
  }
}

}  // namespace dattn
