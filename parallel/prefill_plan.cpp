#include "parallel/prefill_plan.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "kernels/check.hpp"
#include "parallel/moves.hpp"

namespace dattn {
namespace {

/// Each token sees what its sequences share before it, and its stretch up to itself. Positions are
/// those of stretches one behind the other.
class Stretches final : public Mask {
 public:
  Stretches(const Decoding& decoding, const std::vector<Stretch>& stretches) {
    std::vector<std::vector<Range>> shared(decoding.capacity.size());  // of each sequence, so far
    Index begin = 0;
    for (const Stretch& stretch : stretches) {
      const Range here{begin, begin + stretch.keys.size()};
      begins_.push_back(begin);
      before_.push_back(shared[stretch.sequence()]);
      for (Index s = stretch.sequences.begin; s < stretch.sequences.end; ++s) {
        append(shared[static_cast<std::size_t>(s)], 0, here);
      }
      begin = here.end;
    }
  }

  bool allows(Index, Index query, Index key) const override {
    const std::size_t s = stretch(query);
    const auto holds = [&](Range some) { return some.contains(key); };
    return Range{begins_[s], query + 1}.contains(key) ||
           std::any_of(before_[s].begin(), before_[s].end(), holds);
  }
  void spans(Index, Index query, Range keys, std::vector<Range>& out) const override {
    const std::size_t first = out.size();
    const std::size_t s = stretch(query);
    for (const Range some : before_[s]) append(out, first, intersect(some, keys));
    append(out, first, intersect(Range{begins_[s], query + 1}, keys));
  }
  Index variant(Index) const override { return 0; }
  Index heads() const override { return 1; }
  std::string spec() const override { return "stretches"; }

 private:
  /// The stretch that has this token: of those that begin here the last, for others are empty.
  std::size_t stretch(Index query) const {
    const auto next = std::upper_bound(begins_.begin(), begins_.end(), query);
    return static_cast<std::size_t>(next - begins_.begin()) - 1;
  }

  std::vector<Index> begins_;
  std::vector<std::vector<Range>> before_;  ///< by stretch: what is shared before it
};

}  // namespace

Run own_positions(Range keys, int ranks, int rank) {
  const Index first = keys.begin + (rank - keys.begin % ranks + ranks) % ranks;
  return {first, first < keys.end ? (keys.end - first + ranks - 1) / ranks : 0, ranks};
}

Problem prefill_problem(const Decoding& decoding, std::span<const Index> lengths, Index numbers,
                        int ranks, const Hosts& hosts) {
  const std::vector<Stretch> stretches = decoding.stretches(lengths);
  std::vector<Runs> owned(static_cast<std::size_t>(ranks));
  Index tokens = 0;
  for (const Stretch& stretch : stretches) {
    for (int r = 0; r < ranks; ++r) {
      Run own = own_positions(stretch.keys, ranks, r);
      own.first += tokens - stretch.keys.begin;
      owned[static_cast<std::size_t>(r)].push_back(own);
    }
    tokens += stretch.keys.size();
  }
  const Shape shape{.queries = tokens, .keys = tokens, .d_qk = numbers};
  return Problem(shape, std::make_shared<const Stretches>(decoding, stretches), line(ranks),
                 "striped", decoding.type)
      .dealt(Partition(std::move(owned)))
      .with_values_in_keys()
      .across(hosts);
}

Program prefill_program(const Problem& problem, int rank, bool keeps) {
  Writer me(problem, rank);
  const std::vector<int> ring = problem.hosts().side_by_side(problem.mesh().group(0, 0));
  const auto ranks = ring.size();
  const auto here = static_cast<std::size_t>(place_in(ring, rank));
  const auto left = [&](std::size_t hops) { return ring[(here + ranks - hops) % ranks]; };
  const int right = ring[(here + 1) % ranks];
  const SlotId q = me.slot(owned(problem, Kind::Q, rank));
  const SlotId mine = me.slot(owned(problem, Kind::K, rank));
  const SlotId none = me.slot({Kind::V, Ranges{}, {}});
  const SlotId out = me.slot(owned(problem, Kind::O, rank));
  std::vector<int> homes;
  SlotId held = mine;
  for (std::size_t hop = 0; hop < ranks; ++hop) {
    SlotId next = held;
    if (hop + 1 < ranks) {  // what the rank to the left holds comes in, while this is computed
      if (keeps || homes.size() < 2) homes.push_back(me.home());
      next = me.slot(owned(problem, Kind::K, left(hop + 1)), homes[hop % homes.size()]);
      me.recv(next, me.block(next), left(1));
      me.send(held, me.block(held), right);
    }
    me.attend(q, held, held, out);
    held = next;
  }
  return std::move(me).finish(q, mine, none, out, owned(problem, Kind::O, rank));
}

Plan prefill_plan(const Problem& problem, bool keeps) {
  Plan plan;
  for (int r = 0; r < problem.ranks(); ++r) plan.push_back(prefill_program(problem, r, keeps));
  const Rehearsal proof = rehearse(problem, plan);
  if (proof.fault) throw std::logic_error("prefill: " + proof.fault->text());
  return plan;
}

}  // namespace dattn
