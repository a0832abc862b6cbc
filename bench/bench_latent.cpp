// How close does decoding in the absorbed form of latent attention come to this machine's SGEMM and
// memory?
//
//   bench_latent [--json]
//
// One new token of one sequence, ranks of the DeepSeek models (576 numbers a row, values of 512),
// one thread: 16 heads go through decode, which reads the cache as it lies; 64 and 128 through
// panels, which pack tiles. SGEMM, a read of memory and the kernels take turns; medians of their
// ratios.

#include <fmt/format.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "bench/ceilings.hpp"
#include "bench/measure.hpp"
#include "kernels/latent/attention.hpp"
#include "kernels/latent/blas_core.hpp"
#include "kernels/partial.hpp"

namespace dattn {
namespace {

constexpr int kRepeats = 7;

struct Row {
  Index heads, tokens;
  bool bf16;
  std::vector<double> seconds, of_sgemm, of_read;
};

template <class T>
double once(const LatentSizes& sizes, Index tokens, const std::vector<T>& numbers,
            Workspace& memory) {
  std::vector<float> out(static_cast<std::size_t>(sizes.heads * (sizes.kv_rank + 2)));
  const View<float> records{out.data(), 1, sizes.heads, sizes.kv_rank + 2};
  clear(records);
  const View<const T> q{numbers.data(), 1, sizes.heads, sizes.row()};
  const LatentSequence<T> sequence{{numbers.data(), tokens, 1, sizes.row()}, 1};
  const double start = now();
  decode_latent<T>(sizes, q, {&sequence, 1}, records, {.workspace = &memory});
  return now() - start;
}

void measure(Row& row, const std::optional<Sgemm>& sgemm, const MemoryRead& read) {
  LatentSizes sizes = *find_latent_model("deepseek-v3");
  sizes.heads = row.heads;
  std::vector<float> wide(static_cast<std::size_t>(row.tokens * sizes.row()));
  std::mt19937 random(1);
  std::uniform_real_distribution<float> number(-1, 1);
  for (float& x : wide) x = number(random);
  std::vector<BFloat16> narrow;
  for (const float x : wide) narrow.emplace_back(x);
  const double pairs = static_cast<double>(row.heads * row.tokens);
  const double flops = pairs * 2 * static_cast<double>(sizes.row() + sizes.kv_rank);
  const double bytes = static_cast<double>(row.tokens * sizes.row()) * (row.bf16 ? 2 : 4);
  Workspace memory;
  for (int repeat = -1; repeat < kRepeats; ++repeat) {
    const double gflops = sgemm ? sgemm->gflops(1) : 0;
    const double gbps = read.gbps();
    const double seconds =
        row.bf16 ? once(sizes, row.tokens, narrow, memory) : once(sizes, row.tokens, wide, memory);
    if (repeat < 0) continue;  // warms up
    row.seconds.push_back(seconds);
    if (sgemm) row.of_sgemm.push_back(flops / seconds / 1e9 / gflops);
    row.of_read.push_back(bytes / seconds / 1e9 / gbps);
  }
}

}  // namespace
}  // namespace dattn

int main(int count, char** arguments) {
  using namespace dattn;
  choose_blas_core(arguments);
  const bool json = count == 2 && std::strcmp(arguments[1], "--json") == 0;
  if (count > 1 && !json) {
    fmt::print(stderr, "bench_latent: '{}' is no option; want --json or nothing\n", arguments[1]);
    return 2;
  }
  const Isa& isa = chosen_isa();
  const auto sgemm = Sgemm::load();
  const MemoryRead read(1);
  nlohmann::json all = nlohmann::json::array();
  if (!json) {
    fmt::print("{}; OpenBLAS {}; medians of {}\n", isa.name, sgemm ? sgemm->core() : "missing",
               kRepeats);
    fmt::print("heads  tokens  dtype       ms  of SGEMM  of read\n");
  }
  for (const Index heads : {16, 64, 128}) {
    for (const Index tokens : {8192, 32768}) {
      for (const bool bf16 : {false, true}) {
        Row row{heads, tokens, bf16, {}, {}, {}};
        measure(row, sgemm, read);
        const double ms = median(row.seconds) * 1e3;
        const double of_read = median(row.of_read);
        if (json) {
          all.push_back({{"heads", heads},
                         {"tokens", tokens},
                         {"dtype", bf16 ? "bf16" : "f32"},
                         {"isa", isa.name},
                         {"repeats", kRepeats},
                         {"seconds", ms / 1e3},
                         {"ratio_sgemm", sgemm ? nlohmann::json(median(row.of_sgemm)) : nullptr},
                         {"ratio_read", of_read}});
        } else {
          fmt::print("{:5}  {:6}  {:5} {:8.2f}  {:>8}  {:7.2f}\n", heads, tokens,
                     bf16 ? "bf16" : "f32", ms,
                     sgemm ? fmt::format("{:.2f}", median(row.of_sgemm)) : "-", of_read);
        }
      }
    }
  }
  if (json) fmt::print("{}\n", all.dump(1));
  return 0;
}
