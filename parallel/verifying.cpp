#include "parallel/verifying.hpp"

#include <algorithm>

#include "parallel/pseudo_keys.hpp"

namespace dattn {
namespace {

/// The same all-reduce by messages of ours, on one host too.
Reduction by_messages(const std::vector<int>& group, const Problem& problem, Index records) {
  return Reduction(group, problem.hosts(), records, true);
}

/// Of the exchange that makes pseudo-keys.
Index of_pseudo_keys(const Program& program, const Problem& problem) {
  if (problem.compensate() == Compensate::off || program.pass != Pass::forward ||
      problem.ranks() == 1 || pseudo_key_count(problem) == 0) {
    return 0;
  }
  if (problem.compensate() == Compensate::rank) return 2 * (problem.ranks() - 1) * kEnvelopeBytes;
  std::vector<int> all;
  for (int r = 0; r < problem.ranks(); ++r) all.push_back(r);
  const Index record = pseudo_sum_bytes(problem.shape());
  return verified_bytes(by_messages(all, problem, std::ssize(problem.dropped())), program.rank,
                        record) -
         dropped_reduction(problem).scratch(program.rank) * record;
}

}  // namespace

Index envelope_bytes(const Program& program) {
  int peers = 0;
  for (const Step& step : program.steps) {
    if (const auto* send = std::get_if<Send>(&step)) peers = std::max(peers, send->peer + 1);
    if (const auto* recv = std::get_if<Recv>(&step)) peers = std::max(peers, recv->peer + 1);
  }
  constexpr auto kNumber = static_cast<Index>(sizeof(std::int64_t));
  return std::ssize(program.steps) * (kEnvelopeBytes + kNumber) + 2 * peers * kNumber;
}

Index verified_bytes(const Reduction& how, int member, Index record_bytes) {
  return how.scratch(member) * record_bytes + how.messages(member) * kEnvelopeBytes;
}

Index verifying_bytes(const Program& program, const Problem& problem) {
  Index reduces = 0;
  for (const Step& step : program.steps) {
    const auto* reduce = std::get_if<Reduce>(&step);
    if (reduce == nullptr) continue;
    const Block& block = program.slots[static_cast<std::size_t>(reduce->slot)].block;
    const Reduction how = by_messages(problem.mesh().group(program.rank, reduce->axis), problem,
                                      block.row_count() * block.head_count());
    reduces =
        std::max(reduces, verified_bytes(how, problem.mesh().coordinate(program.rank, reduce->axis),
                                         record_bytes(program, *reduce, problem)));
  }
  reduces = std::max<Index>(0, reduces - reduce_bytes(program, problem));
  return envelope_bytes(program) + reduces + of_pseudo_keys(program, problem);
}

}  // namespace dattn
