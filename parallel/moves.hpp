#pragma once

#include <functional>

#include "parallel/plan.hpp"

namespace dattn {

/// Writes one rank's Program. Moves of nothing (no row, no head) are left out on both sides.
class Writer {
 public:
  Writer(const Problem& problem, int rank);

  const Problem& problem() const { return problem_; }
  int rank() const { return program_.rank; }

  /// A new home, and a slot in a new home or in one of those.
  int home() { return program_.homes++; }
  SlotId slot(Block block) { return slot(std::move(block), home()); }
  SlotId slot(Block block, int home);
  const Block& block(SlotId slot) const;
  int home_of(SlotId slot) const;

  void send(SlotId slot, const Block& block, int peer);
  void recv(SlotId slot, const Block& block, int peer);
  /// Left out where the mask allows no pair.
  void attend(SlotId q, SlotId k, SlotId v, SlotId out);
  void merge(SlotId from, SlotId into);
  void reduce(SlotId slot, int axis);

  /// The finished Program; `out` holds the Partial of `delivers` at its end.
  Program finish(SlotId q, SlotId k, SlotId v, SlotId out, Block delivers) &&;

 private:
  const Problem& problem_;
  Program program_;
};

/// What `rank` owns of a tensor: all heads of its rows.
Block owned(const Problem& problem, Kind kind, int rank);

/// The slots of a rank's own shards.
struct Inputs {
  SlotId q, k, v;
};
Inputs inputs(Writer& me);

/// The program of a rank that keeps its queries and delivers what it owns: `attend` gets the slots
/// of its shards and of its Partial.
Program by_token(const Problem& problem, int rank,
                 const std::function<void(Writer&, const Inputs&, SlotId out)>& attend);

/// Sends K and V around the ring `ring` (ranks, in order): what member i starts with, in `k` and
/// `v`, visits i+1, i+2, ... `held(i)` gives the Block that member i starts with, per kind. While
/// one pair is attended to the next is on its way.
void circulate(Writer& me, const std::vector<int>& ring, SlotId q, SlotId k, SlotId v, SlotId out,
               const std::function<Block(Kind, int member)>& held);
/// The same for a rank that goes round more than once: it keeps `homes`, empty at first, from call
/// to call, and what `k` and `v` hold must lie elsewhere.
void circulate(Writer& me, const std::vector<int>& ring, SlotId q, SlotId k, SlotId v, SlotId out,
               const std::function<Block(Kind, int member)>& held, std::vector<int>& homes);

/// Moves a tensor among the ranks of `group` from the Blocks `from` to the Blocks `to` (one a
/// member): messages are their intersections, a member's own part too (it costs a copy, no wire).
/// The member's own Blocks lie in the slots `source` and `target`. May replicate.
void redistribute(Writer& me, const std::vector<int>& group, const std::vector<Block>& from,
                  const std::vector<Block>& to, SlotId source, SlotId target);

/// Fetches from every rank just the keys that the own queries see, nearest ranks first, and
/// attends to each rank's keys while the next ones are on their way.
void pull(Writer& me, SlotId q, SlotId k, SlotId v, SlotId out);

}  // namespace dattn
