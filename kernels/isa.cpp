#include "kernels/isa.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/check.hpp"

namespace dattn {
namespace {

std::vector<const Tiles*> probe() {
  std::vector<const Tiles*> found;
#if defined(DATTN_HAS_X86)
  // These ask the processor and, for the wide registers, whether the system saves them.
  if (__builtin_cpu_supports("avx512f")) found.push_back(&avx512::tiles());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&avx2::tiles());
  }
#endif
  found.push_back(&portable::tiles());
  return found;
}

const Tiles& choose() {
  const char* wanted = std::getenv("DATTN_ISA");
  if (wanted == nullptr || *wanted == '\0') return *available_tiles().front();
  std::string names;
  for (const Tiles* tiles : available_tiles()) {
    if (std::string_view(tiles->name) == wanted) return *tiles;
    names += (names.empty() ? "" : ", ") + std::string(tiles->name);
  }
  throw std::invalid_argument("DATTN_ISA is " + shown(wanted) + ", but this machine has " + names);
}

}  // namespace

std::span<const Tiles* const> available_tiles() {
  static const std::vector<const Tiles*> found = probe();
  return found;
}

const Tiles& chosen_tiles() {
  static const Tiles& chosen = choose();
  return chosen;
}

}  // namespace dattn
