#include "launcher/calibrate.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <vector>

#include "kernels/attend_backward.hpp"
#include "kernels/partial.hpp"
#include "parallel/plan.hpp"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// FLOP/s of the kernel of a pass on a full tile set of a problem like `shape`, but small.
template <class T>
double kernel_rate(const Shape& like, Pass pass, int threads, double at_least) {
  Shape shape = like;
  // Small, but with the rows of K and V as far apart as they will be. Nobody knows yet whether a
  // problem of this size fits into memory, so huge extents are cut; the rate does not differ.
  constexpr Index kWidest = 1024;
  constexpr Index kMostHeads = 64;
  const bool fast = sizeof(T) < 8;
  shape.queries = fast ? 192 : 32;
  shape.keys = fast ? 768 : 64;
  shape.d_qk = std::min(like.d_qk, kWidest);
  shape.d_v = std::min(like.d_v, kWidest);
  if (like.query_heads > kMostHeads) shape.query_heads = shape.key_heads = shape.value_heads = 1;
  const Range heads{0, std::min<Index>(shape.query_heads, threads)};  // one tile of queries each
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
  const Work work{.threads = threads};
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
  const auto start = Clock::now();
  int times = 0;
  while (times < 2 || since(start) < at_least) {
    once();
    ++times;
  }
  return times * static_cast<double>(shape.queries * shape.keys * heads.size()) *
         (backward ? shape.backward_flops_per_pair() : shape.flops_per_pair()) / since(start);
}

/// Seconds of `times` exchanges of `bytes` with both neighbours of the ring of ranks.
double ring_seconds(comm::Communicator& world, std::size_t bytes, int times) {
  std::vector<std::byte> out(bytes);
  std::vector<std::byte> in(bytes);
  const int right = (world.rank() + 1) % world.size();
  const int left = (world.rank() + world.size() - 1) % world.size();
  world.barrier();
  const auto start = Clock::now();
  for (int i = 0; i < times; ++i) {
    auto receive = world.recv(comm::strips_of(std::span<std::byte>(in)), left);
    auto send = world.send(comm::strips_of(std::span<const std::byte>(out)), right);
    receive.wait();
    send.wait();
  }
  return since(start) / times;
}

}  // namespace

Machine calibrate(comm::Communicator& world, const Shape& shape, Type type, int threads,
                  bool backward) {
  Machine machine;
  const auto mean_rate = [&](Pass pass) {
    constexpr double kSeconds = 0.02;
    world.barrier();
    const double rate = type == Type::bf16 ? kernel_rate<BFloat16>(shape, pass, threads, kSeconds)
                        : type == Type::f4 ? kernel_rate<float>(shape, pass, threads, kSeconds)
                                           : kernel_rate<double>(shape, pass, threads, kSeconds);
    std::array<double, 2> sums{rate, 1};
    world.all_reduce_sum(sums);
    return sums[0] / sums[1];
  };
  machine.rate = mean_rate(Pass::forward);
  if (backward) machine.backward_rate = mean_rate(Pass::backward);
  if (world.size() > 1) {
    constexpr std::size_t kLarge = std::size_t{1} << 20;
    ring_seconds(world, kLarge, 1);  // connections are made, buffers touched
    std::array<double, 2> slowest{ring_seconds(world, 8, 16), ring_seconds(world, kLarge, 4)};
    world.all_reduce_max(slowest);
    machine.latency = slowest[0];
    machine.bandwidth =
        static_cast<double>(kLarge) / std::max(slowest[1] - slowest[0], 0.1 * slowest[1]);
  }
  return machine;
}

}  // namespace dattn
