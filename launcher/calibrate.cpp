#include "launcher/calibrate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "kernels/attend_backward.hpp"
#include "kernels/partial.hpp"
#include "launcher/links.hpp"
#include "parallel/plan.hpp"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// A block like those that one of `ranks` ranks computes, cut to about `flops` a thread, and the
/// query heads of it to compute: those of a key head, or one for each thread.
Shape block_like(const Shape& like, int ranks, int threads, double flops_per_pair, double flops,
                 Range& heads) {
  Shape shape = like;
  // The rows of K and V are as far apart as they will be. Nobody knows yet whether a problem of
  // this size fits into memory, so huge extents are cut; the rate does not differ.
  constexpr Index kWidest = 1024;
  constexpr Index kMostHeads = 64;
  constexpr Index kMostNumbers = Index{1} << 24;  // of K
  shape.d_qk = std::min(like.d_qk, kWidest);
  shape.d_v = std::min(like.d_v, kWidest);
  if (like.query_heads > kMostHeads) shape.query_heads = shape.key_heads = shape.value_heads = 1;
  const Index group = shape.query_heads / std::min(shape.key_heads, shape.value_heads);
  heads = {0, std::min<Index>(shape.query_heads, std::max<Index>(threads, group))};
  const double pairs = flops * threads / flops_per_pair / static_cast<double>(heads.size());
  const auto rows = [&](Index all) { return std::max<Index>(1, (all + ranks - 1) / ranks); };
  const auto side = std::max<Index>(1, static_cast<Index>(std::sqrt(pairs)));
  shape.queries = std::min(rows(like.queries), side);
  const auto keys = static_cast<Index>(pairs / static_cast<double>(shape.queries));
  const Index widest = std::max(shape.key_heads * shape.d_qk, shape.value_heads * shape.d_v);
  shape.keys = std::clamp<Index>(keys, 1, std::min(rows(like.keys), kMostNumbers / widest));
  shape.queries = std::min(shape.queries, shape.keys);
  return shape;
}

/// How fast a kernel is seen to be.
struct Rate {
  double flops = 0;    ///< a second
  double seconds = 0;  ///< of one call
  double work = 0;     ///< floating-point operations of one call
};

/// The kernel of a pass on the query heads `heads` of a block, all of whose pairs count.
template <class T>
Rate rate_of(const Shape& shape, Range heads, Pass pass, int threads, const Isa* isa) {
  using Sum = SumOf<T>;
  const auto sized = [](Index n) { return std::vector<T>(static_cast<std::size_t>(n), T{0.01F}); };
  const auto sums = [](Index n) { return std::vector<Sum>(static_cast<std::size_t>(n)); };
  const auto q = sized(shape.queries * heads.size() * shape.d_qk);
  const auto k = sized(shape.keys * shape.key_heads * shape.d_qk);
  const auto v = sized(shape.keys * shape.value_heads * shape.d_v);
  const View<const T> queries{q.data(), shape.queries, heads.size(), shape.d_qk};
  const View<const T> keys{k.data(), shape.keys, shape.key_heads, shape.d_qk};
  const View<const T> values{v.data(), shape.keys, shape.value_heads, shape.d_v};
  auto out = sums(shape.queries * heads.size() * record_length(shape.d_v));
  const View<Sum> result{out.data(), shape.queries, heads.size(), record_length(shape.d_v)};
  clear(result);
  const MaskPtr mask = parse_mask("full", shape);
  const Where where{shape,
                    heads,
                    {0, shape.key_heads},
                    {0, shape.value_heads},
                    {{0, shape.queries, 1}},
                    {{0, shape.keys, 1}}};
  Workspace workspace;
  const Work work{.threads = threads, .isa = isa, .workspace = &workspace};
  // LSE is about ln(keys) for equal scores; delta and dO may be anything.
  const bool backward = pass == Pass::backward;
  const auto d_o = sized(backward ? shape.queries * heads.size() * shape.d_v : 0);
  const std::vector<Sum> stats(
      backward ? static_cast<std::size_t>(shape.queries * heads.size()) : 0,
      static_cast<Sum>(std::log(static_cast<double>(shape.keys))));
  auto dq = sums(backward ? std::ssize(q) : 0);
  auto dk = sums(backward ? std::ssize(k) : 0);
  auto dv = sums(backward ? std::ssize(v) : 0);
  const auto once = [&] {
    if (!backward) return attend(queries, keys, values, result, where, *mask, work);
    const View<const Sum> known{stats.data(), shape.queries, heads.size(), 1};
    attend_backward(
        queries, keys, values, View<const T>{d_o.data(), shape.queries, heads.size(), shape.d_v},
        known, known, View<Sum>{dq.data(), queries.rows, queries.heads, queries.dim},
        View<Sum>{dk.data(), keys.rows, keys.heads, keys.dim},
        View<Sum>{dv.data(), values.rows, values.heads, values.dim}, where, *mask, work);
  };
  once();  // threads start, pages are touched
  constexpr double kAtLeast = 0.02;
  constexpr std::size_t kRuns = 3;
  std::vector<double> seconds;
  const auto begin = Clock::now();
  while (seconds.size() < kRuns || since(begin) < kAtLeast) {
    const auto start = Clock::now();
    once();
    seconds.push_back(since(start));
  }
  const auto middle = seconds.begin() + std::ssize(seconds) / 2;
  std::nth_element(seconds.begin(), middle, seconds.end());
  const Shape& s = shape;
  const double flops = static_cast<double>(s.queries * s.keys * heads.size()) *
                       (backward ? s.backward_flops_per_pair() : s.flops_per_pair());
  return {flops / *middle, *middle, flops};
}

/// The same on a block like those to come, see block_like().
template <class T>
Rate rate_of_block(const Shape& like, int ranks, Pass pass, int threads, double flops,
                   const Isa* isa = nullptr) {
  const double flops_per_pair =
      pass == Pass::forward ? like.flops_per_pair() : like.backward_flops_per_pair();
  Range heads;
  const Shape shape = block_like(like, ranks, threads, flops_per_pair, flops, heads);
  return rate_of<T>(shape, heads, pass, threads, isa);
}

/// Bytes a second of query rows and their records, from a block of many of them that see few keys;
/// 0 if its time is that of its pairs. @pre `rate` is that of large blocks, forward
template <class T>
double row_rate(const Shape& like, int ranks, int threads, double rate, const Isa* isa = nullptr) {
  constexpr Index kRecords = Index{32} << 20;  // bytes, a thread
  constexpr Index kKeys = 64;
  Range heads;
  Shape shape = block_like(like, ranks, threads, like.flops_per_pair(), 2e9, heads);
  const Index record = record_length(shape.d_v) * static_cast<Index>(sizeof(SumOf<T>));
  shape.keys = kKeys;
  const Index rows = (like.queries + ranks - 1) / ranks;  // no more than there are
  shape.queries =
      std::clamp<Index>(kRecords * threads / (record * heads.size()), 1, std::max<Index>(1, rows));
  const Rate seen = rate_of<T>(shape, heads, Pass::forward, threads, isa);
  const auto records = static_cast<double>(shape.queries * heads.size());
  const double of_pairs = records * kKeys * shape.flops_per_pair() / rate;
  const double of_rows = seen.seconds - of_pairs;
  if (of_rows < 0.1 * seen.seconds) return 0;
  return records * static_cast<double>(shape.d_qk * static_cast<Index>(sizeof(T)) + 2 * record) /
         of_rows;
}

/// FLOP/s of a thread's share of a pass. A block that takes less than kEnough says too little of
/// larger ones, if there are larger ones: kernels do work for each row, too, and a core has slow
/// moments.
template <class T>
double kernel_rate(const Shape& like, int ranks, Pass pass, int threads) {
  constexpr double kEnough = 0.03;
  const double flops = sizeof(T) < 8 ? 2e9 : 1e6;
  const Rate rate = rate_of_block<T>(like, ranks, pass, threads, flops);
  if (rate.seconds >= kEnough || rate.work < 0.9 * flops * threads) return rate.flops;
  return rate_of_block<T>(like, ranks, pass, threads, rate.flops / threads * kEnough).flops;
}

/// FLOP/s from a block that takes some tens of milliseconds, whatever the instruction set.
template <class T>
double quick_rate(const Shape& like, int ranks, Pass pass, int threads, const Isa* isa) {
  constexpr double kFew = 1e6;
  constexpr double kSeconds = 0.02;
  const Rate probe = rate_of_block<T>(like, ranks, pass, threads, kFew, isa);
  return rate_of_block<T>(like, ranks, pass, threads, probe.flops / threads * kSeconds, isa).flops;
}

template <class T>
KernelRates quick_rates(comm::Communicator& world, const Shape& like, int threads, const Isa* isa,
                        bool with_rows) {
  KernelRates rates;
  const auto slowest = [&](double rate) {
    std::array<double, 1> all{rate};
    world.all_reduce_min(all);
    return all[0];
  };
  const int ranks = world.size();
  world.barrier();
  rates.forward = slowest(quick_rate<T>(like, ranks, Pass::forward, threads, isa));
  rates.backward = slowest(quick_rate<T>(like, ranks, Pass::backward, threads, isa));
  if constexpr (sizeof(T) < 8) {
    if (with_rows) {
      const double free = std::numeric_limits<double>::infinity();
      const double own = row_rate<T>(like, ranks, threads, rates.forward, isa);
      const double all = slowest(own > 0 ? own : free);
      rates.rows = all == free ? 0 : all;
    }
  }
  return rates;
}

double kernel_rate(const Shape& like, int ranks, Type type, Pass pass, int threads) {
  return type == Type::bf16 ? kernel_rate<BFloat16>(like, ranks, pass, threads)
         : type == Type::f4 ? kernel_rate<float>(like, ranks, pass, threads)
                            : kernel_rate<double>(like, ranks, pass, threads);
}

}  // namespace

Machine calibrate(comm::Communicator& world, const Shape& shape, Type type, int threads,
                  bool backward, const Hosts& hosts, const Speeds& speeds) {
  Machine machine;
  machine.name = "measured at the start";
  const double own_speed = speeds.of(world.rank());
  // All ranks at once, as they will compute; a run takes as long as the slowest of them.
  const auto slowest_rate = [&](Pass pass) {
    world.barrier();
    std::array<double, 1> rate{kernel_rate(shape, world.size(), type, pass, threads) / own_speed};
    world.all_reduce_min(rate);
    return rate[0];
  };
  machine.rate = slowest_rate(Pass::forward);
  if (type != Type::f8) {
    world.barrier();
    const auto row_seconds = [](double bytes) { return bytes > 0 ? 1 / bytes : 0; };
    const double own_rate = machine.rate * own_speed;
    std::array<double, 1> slowest{
        own_speed * row_seconds(type == Type::bf16
                                    ? row_rate<BFloat16>(shape, world.size(), threads, own_rate)
                                    : row_rate<float>(shape, world.size(), threads, own_rate))};
    world.all_reduce_max(slowest);
    machine.rows = row_seconds(slowest[0]);
  }
  if (backward) machine.backward_rate = slowest_rate(Pass::backward);
  const Links links = measure_links(world, hosts);
  if (const auto& link = links.inside ? links.inside : links.between) {
    machine.latency = link->latency;
    machine.bandwidth = link->bandwidth;
  }
  if (links.between) {
    machine.net_latency = links.between->latency;
    machine.net_bandwidth = links.between->bandwidth;
  }
  return machine;
}

Speeds measure_speeds(comm::Communicator& world, const Shape& shape, Type type, int threads) {
  constexpr int kRounds = 5;
  constexpr int kSteps = 32;
  std::vector<double> rates;
  for (int round = 0; round < kRounds; ++round) {
    world.barrier();
    rates.push_back(kernel_rate(shape, world.size(), type, Pass::forward, threads));
  }
  std::nth_element(rates.begin(), rates.begin() + kRounds / 2, rates.end());
  // Rank 0 decides, so that no rank's rounding counts.
  std::string words;
  const std::vector<std::string> all = world.gather(fmt::format("{:a}", rates[kRounds / 2]));
  if (world.rank() == 0) {
    std::vector<double> by_rank;
    for (const std::string& rate : all) by_rank.push_back(std::strtod(rate.c_str(), nullptr));
    const Speeds speeds = rounded_speeds(by_rank, kSteps);
    if (!speeds.equal()) words = speeds.text();
  }
  world.broadcast(words, 0);
  return words.empty() ? Speeds() : parse_speeds(words, world.size());
}

KernelRates measure_kernels(comm::Communicator& world, const Shape& shape, Type type, int threads,
                            const Isa* isa, bool with_rows) {
  const auto measure = type == Type::bf16 ? quick_rates<BFloat16>
                       : type == Type::f4 ? quick_rates<float>
                                          : quick_rates<double>;
  return measure(world, shape, threads, isa, with_rows);
}

}  // namespace dattn
