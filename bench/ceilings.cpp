#include "bench/ceilings.hpp"

#include <dlfcn.h>
#include <fmt/format.h>
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#include "bench/measure.hpp"
#include "kernels/bfloat.hpp"

#if defined(__x86_64__) && defined(__linux__)
#define DATTN_X86 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#else
#define DATTN_X86 0
#endif

namespace dattn {
namespace {

constexpr std::size_t kAlignment = 4096;

/// Sum over `threads` threads of the rate that `rate(thread)` returns; all start together.
template <class Rate>
double summed(int threads, const Rate& rate) {
  double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
#pragma omp barrier
    sum += rate(omp_get_thread_num());
  }
  return sum;
}

}  // namespace

template <class T>
Uninitialized<T>::Uninitialized(std::size_t count)
    : count_(count),
      numbers_(static_cast<T*>(::operator new (std::max<std::size_t>(count, 1) * sizeof(T),
                                               std::align_val_t{kAlignment}))) {}

template <class T>
void Uninitialized<T>::Free::operator()(T* numbers) const {
  ::operator delete (numbers, std::align_val_t{kAlignment});
}

template class Uninitialized<std::byte>;
template class Uninitialized<float>;
template class Uninitialized<BFloat16>;

std::size_t beyond_caches() {
  constexpr std::size_t least = std::size_t{256} << 20;
  constexpr std::size_t most = std::size_t{2} << 30;
#ifdef _SC_LEVEL3_CACHE_SIZE
  const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  const long cache = 0;
#endif
  return std::clamp(cache > 0 ? 2 * static_cast<std::size_t>(cache) : least, least, most);
}

std::optional<Sgemm> Sgemm::load() {
#if DATTN_X86
  if (__builtin_cpu_supports("avx512f")) setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);
#endif
  setenv("OPENBLAS_NUM_THREADS", "1", 1);
  void* library = nullptr;
  for (const char* name : {"libopenblas.so.0", "libopenblas.so"}) {
    if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) return std::nullopt;
  const auto function = reinterpret_cast<Function>(dlsym(library, "cblas_sgemm"));
  const auto core = reinterpret_cast<char* (*)()>(dlsym(library, "openblas_get_corename"));
  const auto set_threads =
      reinterpret_cast<void (*)(int)>(dlsym(library, "openblas_set_num_threads"));
  if (function == nullptr || core == nullptr || set_threads == nullptr) return std::nullopt;
  // Its OpenMP build makes this the default of every later parallel region, and goes by that
  // default whenever it is called: see gflops().
  const int threads = omp_get_max_threads();
  set_threads(1);
  omp_set_num_threads(threads);
  return Sgemm(function, core());
}

double Sgemm::gflops(int threads) const {
  constexpr int n = 768;
  constexpr std::size_t size = std::size_t{n} * n;
  constexpr double least_seconds = 0.02;
  return summed(threads, [&](int) {
    // Each thread keeps its matrices from call to call.
    thread_local const auto matrices = [] {
      auto numbers = std::make_unique<Uninitialized<float>>(3 * size);
      for (std::size_t i = 0; i < 3 * size; ++i) {
        numbers->data()[i] = static_cast<float>(i % 17) / 17.0F - 0.5F;
      }
      return numbers;
    }();
    float* const a = matrices->data();
    const int team = omp_get_max_threads();
    omp_set_num_threads(1);
    const double start = now();
    double end = start;
    int count = 0;
    for (; end - start < least_seconds; ++count, end = now()) {
      function_(101, 111, 111, n, n, n, 1.0F, a, n, a + size, n, 0.0F, a + 2 * size, n);
    }
    omp_set_num_threads(team);
    return 2.0 * n * n * n * count / (end - start) / 1e9;
  });
}

namespace amx_registers {

#if DATTN_X86

namespace {

struct alignas(64) Tiles {  // palette 1
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::array<std::uint8_t, 14> reserved{};
  std::array<std::uint16_t, 16> row_bytes{64, 64, 64, 64, 64, 64, 64, 64};
  std::array<std::uint8_t, 16> rows{16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Tiles) == 64);

/// 6 * rounds products of 16x32 by 32x16, six accumulators. Inline assembly, because GCC 12's
/// _tile_loadconfig declares 8 of the 64 bytes that it reads.
void products(long rounds, const BFloat16* numbers) {
  const Tiles tiles;
  const long stride = 64;
  asm volatile(
      "ldtilecfg %[tiles]\n\t"
      "tileloadd (%[numbers], %[stride]), %%tmm6\n\t"
      "tileloadd (%[numbers], %[stride]), %%tmm7\n\t"
      "tilezero %%tmm0\n\t"
      "tilezero %%tmm1\n\t"
      "tilezero %%tmm2\n\t"
      "tilezero %%tmm3\n\t"
      "tilezero %%tmm4\n\t"
      "tilezero %%tmm5\n"
      "1:\n\t"
      "tdpbf16ps %%tmm7, %%tmm6, %%tmm0\n\t"
      "tdpbf16ps %%tmm7, %%tmm6, %%tmm1\n\t"
      "tdpbf16ps %%tmm7, %%tmm6, %%tmm2\n\t"
      "tdpbf16ps %%tmm7, %%tmm6, %%tmm3\n\t"
      "tdpbf16ps %%tmm7, %%tmm6, %%tmm4\n\t"
      "tdpbf16ps %%tmm7, %%tmm6, %%tmm5\n\t"
      "decq %[rounds]\n\t"
      "jnz 1b\n\t"
      "tilerelease"
      : [rounds] "+r"(rounds)
      : [tiles] "m"(tiles), [numbers] "r"(numbers), [stride] "r"(stride)
      : "memory", "cc");
}

}  // namespace

bool present() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid_count(1, 0, &a, &b, &c, &d) == 0 || (c & bit_OSXSAVE) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned bf16_and_tiles = 1U << 22U | 1U << 24U;
  if ((d & bf16_and_tiles) != bf16_and_tiles) return false;
  unsigned low = 0;
  unsigned high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tile_state = 3U << 17U;
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;
  return (low & tile_state) == tile_state &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

double gflops(int threads) {
  constexpr long rounds = 20000;  // about 1 ms
  constexpr double least_seconds = 0.01;
  constexpr double flops_per_product = 2.0 * 16 * 16 * 32;
  return summed(threads, [&](int) {
    std::array<BFloat16, std::size_t{16} * 32> numbers;
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = BFloat16(static_cast<float>(i % 17) / 17.0F - 0.5F);
    }
    const double start = now();
    double end = start;
    double count = 0;
    for (; end - start < least_seconds; count += 6.0 * rounds, end = now()) {
      products(rounds, numbers.data());
    }
    return flops_per_product * count / (end - start) / 1e9;
  });
}

#else

bool present() { return false; }
double gflops(int) { return 0; }

#endif

}  // namespace amx_registers

namespace pair_registers {

#if DATTN_X86

namespace {

constexpr int kSums = 12;  // more than the latency of a product

/// kSums * rounds products of 32 pairs' numbers.
__attribute__((target("avx512f,avx512bf16"))) float products(long rounds) {
  const auto one = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  __m512 sums[kSums];  // NOLINT: an array class drops the alignment
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  asm volatile("");  // or calls of the same arguments become one
  for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, one, one);
  }
  for (const __m512& sum : sums) sums[0] = _mm512_add_ps(sums[0], sum);
  alignas(64) std::array<float, 16> all;
  _mm512_store_ps(all.data(), sums[0]);
  return all[0];
}

}  // namespace

bool present() { return __builtin_cpu_supports("avx512bf16"); }

double gflops(int threads) {
  constexpr long rounds = 20000;
  constexpr double least_seconds = 0.01;
  constexpr double flops_per_product = 2.0 * 32;
  return summed(threads, [&](int) {
    volatile float sink = 0;
    const double start = now();
    double end = start;
    double count = 0;
    for (; end - start < least_seconds; count += kSums * rounds, end = now()) {
      sink = sink + products(rounds);
    }
    return flops_per_product * count / (end - start) / 1e9;
  });
}

#else

bool present() { return false; }
double gflops(int) { return 0; }

#endif

}  // namespace pair_registers

namespace {

// Sums `streams` neighbouring parts of `bytes` bytes each, 256 bytes of each in turn. Integer sums:
// they have no latency to hide and no denormals.
constexpr std::size_t kStep = 256;

#if DATTN_X86

__attribute__((target("avx512f"))) std::int64_t read_avx512(const std::byte* data,
                                                            std::size_t bytes, int streams,
                                                            int ahead) {
  __m512i s0 = _mm512_setzero_si512();
  __m512i s1 = s0;
  __m512i s2 = s0;
  __m512i s3 = s0;
  for (std::size_t i = 0; i < bytes; i += kStep) {
    for (int s = 0; s < streams; ++s) {
      const std::byte* p = data + static_cast<std::size_t>(s) * bytes + i;
      if (ahead > 0) {
        for (int line = 0; line < 4; ++line) __builtin_prefetch(p + ahead + 64 * line);
      }
      s0 = _mm512_add_epi64(s0, _mm512_loadu_si512(p));
      s1 = _mm512_add_epi64(s1, _mm512_loadu_si512(p + 64));
      s2 = _mm512_add_epi64(s2, _mm512_loadu_si512(p + 128));
      s3 = _mm512_add_epi64(s3, _mm512_loadu_si512(p + 192));
    }
  }
  const __m512i all = _mm512_add_epi64(_mm512_add_epi64(s0, s1), _mm512_add_epi64(s2, s3));
  alignas(64) std::array<std::int64_t, 8> parts;
  _mm512_store_si512(parts.data(), all);
  std::int64_t sum = 0;
  for (const std::int64_t part : parts) sum ^= part;
  return sum;
}

__attribute__((target("avx2"))) std::int64_t read_avx2(const std::byte* data, std::size_t bytes,
                                                       int streams, int ahead) {
  __m256i s0 = _mm256_setzero_si256();
  __m256i s1 = s0;
  __m256i s2 = s0;
  __m256i s3 = s0;
  for (std::size_t i = 0; i < bytes; i += kStep) {
    for (int s = 0; s < streams; ++s) {
      const std::byte* p = data + static_cast<std::size_t>(s) * bytes + i;
      if (ahead > 0) {
        for (int line = 0; line < 4; ++line) __builtin_prefetch(p + ahead + 64 * line);
      }
      for (int half = 0; half < 2; ++half) {
        const auto* v = reinterpret_cast<const __m256i*>(p + 128 * half);
        s0 = _mm256_add_epi64(s0, _mm256_loadu_si256(v));
        s1 = _mm256_add_epi64(s1, _mm256_loadu_si256(v + 1));
        s2 = _mm256_add_epi64(s2, _mm256_loadu_si256(v + 2));
        s3 = _mm256_add_epi64(s3, _mm256_loadu_si256(v + 3));
      }
    }
  }
  const __m256i all = _mm256_add_epi64(_mm256_add_epi64(s0, s1), _mm256_add_epi64(s2, s3));
  alignas(32) std::array<std::int64_t, 4> parts;
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts.data()), all);
  return parts[0] ^ parts[1] ^ parts[2] ^ parts[3];
}

#endif

std::int64_t read_plain(const std::byte* data, std::size_t bytes, int streams, int ahead) {
  std::array<std::int64_t, 8> sums{};
  for (std::size_t i = 0; i < bytes; i += kStep) {
    for (int s = 0; s < streams; ++s) {
      const std::byte* p = data + static_cast<std::size_t>(s) * bytes + i;
      if (ahead > 0) {
        for (int line = 0; line < 4; ++line) __builtin_prefetch(p + ahead + 64 * line);
      }
      std::array<std::int64_t, kStep / 8> numbers;
      std::memcpy(numbers.data(), p, kStep);
      for (std::size_t j = 0; j < numbers.size(); ++j) sums[j % 8] ^= numbers[j];
    }
  }
  return std::accumulate(sums.begin(), sums.end(), std::int64_t{0});
}

using Reader = std::int64_t (*)(const std::byte*, std::size_t, int, int);

Reader widest_reader() {
#if DATTN_X86
  if (__builtin_cpu_supports("avx512f")) return read_avx512;
  if (__builtin_cpu_supports("avx2")) return read_avx2;
#endif
  return read_plain;
}

constexpr std::size_t kMostStreams = 4;

}  // namespace

MemoryRead::MemoryRead(int threads, std::size_t bytes)
    : threads_(threads),
      part_(bytes / static_cast<std::size_t>(threads) / (kStep * kMostStreams) * kStep *
            kMostStreams),
      buffer_(part_ * static_cast<std::size_t>(threads)) {
#pragma omp parallel num_threads(threads)
  std::memset(buffer_.data() + static_cast<std::size_t>(omp_get_thread_num()) * part_, 1, part_);
  double best = 0;
  for (const int streams : {1, 4}) {
    for (const int ahead : {0, 1024, 4096}) {
      double least = seconds(streams, ahead);
      for (int i = 0; i < 2; ++i) least = std::min(least, seconds(streams, ahead));
      if (best > 0 && least >= best) continue;
      best = least;
      streams_ = streams;
      ahead_ = ahead;
    }
  }
}

double MemoryRead::seconds(int streams, int ahead) const {
  static const Reader reader = widest_reader();
  std::int64_t sum = 0;
  const double start = now();
#pragma omp parallel num_threads(threads_) reduction(^ : sum)
  sum ^= reader(buffer_.data() + static_cast<std::size_t>(omp_get_thread_num()) * part_,
                part_ / static_cast<std::size_t>(streams), streams, ahead);
  const double end = now();
  sink_ = sink_ + static_cast<float>(sum);
  return end - start;
}

double MemoryRead::gbps() const {
  return static_cast<double>(buffer_.size()) / seconds(streams_, ahead_) / 1e9;
}

std::string MemoryRead::way() const {
  return fmt::format("{} {} a thread, {}", streams_, streams_ == 1 ? "stream" : "streams",
                     ahead_ == 0 ? "no prefetch" : fmt::format("prefetch {} bytes ahead", ahead_));
}

}  // namespace dattn
