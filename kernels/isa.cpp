#include "kernels/isa.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/check.hpp"
#include "kernels/isa/pairs.hpp"

#if defined(DATTN_HAS_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dattn {
namespace {

#if defined(DATTN_HAS_X86)
/// What the kernels for AVX-512 take. Asks the processor, and whether the system saves the wide
/// registers.
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

/// Whether the processor has AVX-512 with bfloat16 and bfloat16 tiles, the system saves their
/// registers, and it lets this process use them.
bool has_amx() {
#if defined(__linux__)
  if (!has_avx512_bf16()) return false;
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kTiles = 1u << 24;
  constexpr unsigned kBFloat16 = 1u << 22;
  if ((d & kTiles) == 0 || (d & kBFloat16) == 0) return false;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & (1u << 27)) == 0) return false;  // XGETBV
  unsigned low = 0;
  unsigned high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Isa*> probe() {
  std::vector<const Isa*> found;
#if defined(DATTN_HAS_X86)
  static const Isa amx_isa{"amx", &avx512::kernel(), &amx::kernel()};
  static const Isa avx512_bf16_isa{"avx512_bf16", &avx512::kernel(), &avx512_bf16::kernel()};
  static const Isa avx512_isa{"avx512", &avx512::kernel(), &avx512::kernel()};
  static const Isa avx2_isa{"avx2", &avx2::kernel(), &avx2::kernel()};
  if (has_amx()) found.push_back(&amx_isa);
  // Intel's processors multiply pairs at half the rate of multiply-adds, or less: best last there.
  // By the vendor, not by a measurement: all runs and ranks must choose alike.
  const bool slow_pairs = __builtin_cpu_is("intel") != 0;
  if (has_avx512_bf16() && !slow_pairs) found.push_back(&avx512_bf16_isa);
  if (has_avx512()) found.push_back(&avx512_isa);
  if (has_avx512_bf16() && slow_pairs) found.push_back(&avx512_bf16_isa);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&avx2_isa);
  }
#endif
  static const Isa portable_isa{"portable", &portable::kernel(), &portable::kernel()};
  found.push_back(&portable_isa);
  return found;
}

const Isa& choose() {
  const char* wanted = std::getenv("DATTN_ISA");
  if (wanted == nullptr || *wanted == '\0') return *available_isas().front();
  std::string names;
  for (const Isa* isa : available_isas()) {
    if (std::string_view(isa->name) == wanted) return *isa;
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw std::invalid_argument("DATTN_ISA is " + shown(wanted) + ", but this machine has " + names);
}

}  // namespace

std::span<const Isa* const> available_isas() {
  static const std::vector<const Isa*> found = probe();
  return found;
}

const Isa& chosen_isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace dattn
