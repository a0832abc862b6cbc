#include "kernels/latent/blas_core.hpp"

#include <cblas.h>
#include <strings.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <span>

namespace dattn {
namespace {

bool is_one_of(std::span<const char* const> names, const char* name) {
  return std::any_of(names.begin(), names.end(),
                     [&](const char* n) { return ::strcasecmp(n, name) == 0; });
}

/// What OpenBLAS should have taken; null where it has, or where this does not know better.
const char* better_core() {
#if defined(__x86_64__)
  constexpr std::array kAvx512{"SkylakeX", "Cooperlake", "SapphireRapids"};
  constexpr std::array kAvx2{"Haswell", "Zen"};
  const char* core = blas_core();
  if (is_one_of(kAvx512, core)) return nullptr;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512.front();
  }
  if (is_one_of(kAvx2, core)) return nullptr;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2.front();
#endif
  return nullptr;
}

}  // namespace

const char* blas_core() { return openblas_get_corename(); }

void choose_blas_core(char** arguments) {
  constexpr const char* kVariable = "OPENBLAS_CORETYPE";
  if (std::getenv(kVariable) != nullptr) return;
  const char* core = better_core();
  if (core == nullptr || ::setenv(kVariable, core, 0) != 0) return;
  ::execv("/proc/self/exe", arguments);  // comes back only where there is no such thing
}

}  // namespace dattn
