#include "parallel/pseudo_keys.hpp"

#include <algorithm>
#include <numeric>

#include "parallel/plan.hpp"

namespace dattn {

std::vector<PseudoKey> pseudo_keys(const Problem& problem) {
  std::vector<PseudoKey> all;
  if (problem.compensate() == Compensate::off) return all;
  for (std::size_t i = 0; i < problem.dropped().size(); ++i) {
    if (problem.compensate() == Compensate::head) {
      all.push_back({i, -1, size(problem.dropped()[i].keys)});
      continue;
    }
    for (int r = 0; r < problem.ranks(); ++r) {
      const Index count = problem.dropped_of(r)[i];
      if (count > 0) all.push_back({i, r, count});
    }
  }
  return all;
}

namespace {

/// Entries of which the rank owns keys.
Index own_entries(const Problem& problem, int rank) {
  const std::vector<Index>& counts = problem.dropped_of(rank);
  return std::count_if(counts.begin(), counts.end(), [](Index n) { return n > 0; });
}

}  // namespace

Index pseudo_key_count(const Problem& problem) {
  if (problem.compensate() == Compensate::off) return 0;
  if (problem.compensate() == Compensate::head) return std::ssize(problem.dropped());
  Index sum = 0;
  for (int r = 0; r < problem.ranks(); ++r) sum += own_entries(problem, r);
  return sum;
}

Index pseudo_sum_bytes(const Shape& shape) {
  return (shape.d_qk + shape.d_v) * static_cast<Index>(sizeof(double));
}

Index pseudo_key_bytes(const Shape& shape, Type type) {
  return (shape.d_qk + shape.d_v) * sum_bytes_of(type);
}

Reduction dropped_reduction(const Problem& problem) {
  std::vector<int> ranks(static_cast<std::size_t>(problem.ranks()));
  std::iota(ranks.begin(), ranks.end(), 0);
  return Reduction(ranks, problem.hosts(), std::ssize(problem.dropped()));
}

PseudoKeyCost pseudo_key_cost(const Problem& problem, int rank, const Machine& machine) {
  PseudoKeyCost cost;
  const Index count = pseudo_key_count(problem);
  if (count == 0) return cost;
  const Shape& shape = problem.shape();
  const Index ranks = problem.ranks();
  const Index entries = std::ssize(problem.dropped());
  const Index sum_bytes = pseudo_sum_bytes(shape);
  const Index key_bytes = pseudo_key_bytes(shape, problem.type());
  const Link link = problem.hosts().count() > 1 ? machine.between() : machine.inside();
  const auto seconds = [&](Index bytes) { return static_cast<double>(bytes) / link.bandwidth; };
  if (problem.compensate() == Compensate::head) {
    const Reduction how = dropped_reduction(problem);
    cost.messages = ranks > 1 ? 1 : 0;
    cost.bytes_sent = ranks > 1 ? how.sent_by(rank) * sum_bytes : 0;
    cost.wait_seconds = how.seconds(machine, sum_bytes);
    cost.memory_bytes = how.scratch(rank) * sum_bytes;
  } else {
    const Index own = own_entries(problem, rank);
    cost.messages = own > 0 ? ranks - 1 : 0;
    cost.bytes_sent = (ranks - 1) * own * key_bytes;
    const Index received = (count - own) * key_bytes;
    if (ranks > 1) {
      cost.wait_seconds = static_cast<double>(2 * (ranks - 1)) * machine.overhead + link.latency +
                          seconds(std::max(cost.bytes_sent, received));
    }
  }
  cost.memory_bytes += entries * sum_bytes + count * key_bytes;
  // Heads that share an entry read as many pseudo-keys as it has; on average is good enough.
  Index heads = 0;
  for (const Dropped& entry : problem.dropped()) heads += entry.query_heads.size();
  const double rows = static_cast<double>(problem.queries().rows(rank).size());
  cost.compute_seconds = rows * static_cast<double>(heads) * static_cast<double>(count) /
                         static_cast<double>(entries) * shape.flops_per_pair() / machine.rate;
  if (machine.rows > 0) {
    const std::vector<Index>& counts = problem.dropped_of(rank);
    const Index read = std::accumulate(counts.begin(), counts.end(), Index{0});
    cost.compute_seconds +=
        static_cast<double>(read * (shape.d_qk + shape.d_v) * bytes_of(problem.type())) /
        machine.rows;
  }
  cost.compute_seconds /= problem.speeds().of(rank);
  return cost;
}

}  // namespace dattn
