#pragma once

#include <array>
#include <functional>
#include <utility>
#include <vector>

#include "parallel/plan.hpp"
#include "parallel/strips.hpp"

namespace dattn {

/// Which member of `group` the rank is. @pre it is one
int place_in(const std::vector<int>& group, int rank);

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
  /// Likewise.
  void attend_backward(const AttendBackward& slots);
  void merge(SlotId from, SlotId into);
  void add(SlotId from, SlotId into);
  void reduce(SlotId slot, int axis);

  /// A slot for a sum in one of the homes, cleared where the home has had other slots before.
  SlotId fresh(Block block, int home);

  /// Whether the mask allows any pair of the rows and heads of two slots.
  bool sees(SlotId q, SlotId k) const;

  /// Has the backward pass start with what `slot` holds in the end.
  void keep(SlotId slot) { program_.kept.push_back(slot); }

  /// For people: one more thing that was chosen, and why.
  void note(const std::string& text) {
    program_.note += (program_.note.empty() ? "" : "; ") + text;
  }

  /// The finished forward Program; `out` holds the Partial of `delivers` at its end.
  Program finish(SlotId q, SlotId k, SlotId v, SlotId out, Block delivers) &&;
  /// The finished backward Program: the inputs are those of `slots`, and so are the gradients,
  /// which deliver what the rank owns.
  Program finish(const AttendBackward& slots) &&;

 private:
  const Problem& problem_;
  Program program_;
  std::vector<bool> used_;  ///< by home: some slot lies there
};

/// What `rank` owns of a tensor: all heads of its rows.
Block owned(const Problem& problem, Kind kind, int rank);
/// Whether `rank` owns neither queries nor keys, as most do where there are more ranks than tokens.
bool owns_nothing(const Problem& problem, int rank);
bool own_nothing(const Problem& problem, const std::vector<int>& ranks);

/// The slots of a rank's own shards.
struct Inputs {
  SlotId q, k, v;
};
Inputs inputs(Writer& me);

/// The slots of what a rank starts the backward pass with and of what it delivers, `block` of each
/// kind; without `block` its own shards.
AttendBackward backward_inputs(Writer& me, const std::function<Block(Kind)>& block);
AttendBackward backward_inputs(Writer& me);

/// The program of a rank that keeps its queries and delivers what it owns: `attend` gets the slots
/// of its shards and of its Partial.
Program by_token(const Problem& problem, int rank,
                 const std::function<void(Writer&, const Inputs&, SlotId out)>& attend);

/// The backward program of a rank that keeps and delivers what it owns: `attend` gets the slots of
/// its shards and of their gradients.
Program by_token_backward(const Problem& problem, int rank,
                          const std::function<void(Writer&, const AttendBackward&)>& attend);

/// Sends K and V around the ring `ring` (ranks, in order): what member i starts with, in `k` and
/// `v`, visits i+1, i+2, ..., of heads that see little just the rows that members further on need
/// (Strips). While one pair is attended to the next is on its way. `meanwhile`, if there is one,
/// writes other work, behind that on the rank's own keys; inputs then arrive one stage ahead, not
/// more.
void circulate(Writer& me, const std::vector<int>& ring, SlotId q, SlotId k, SlotId v, SlotId out,
               const Held& held, const std::function<void()>& meanwhile = {},
               const StandsFor& stands_for = {});
/// Slots of K and V: of each strip, or one that has all of them.
using KeySlots = std::vector<std::pair<SlotId, SlotId>>;
/// The same for a rank that goes round more than once: it keeps `homes`, empty at first, from call
/// to call, and what the slots `mine` hold must lie elsewhere.
void circulate(Writer& me, const Strips& strips, SlotId q, const KeySlots& mine, SlotId out,
               std::vector<int>& homes, const std::function<void()>& meanwhile = {});

/// The side that is fewer bytes, to go around rings in the backward pass: in what these ranks start
/// with (`held`) or, if some heads are packed, in what ranks need of each other; the Program's note
/// says why.
Side lighter_side(Writer& me, const std::vector<int>& ranks, const Held& held);

/// The backward pass of circulate(). Either K and V go around and, one hop behind them, the sums of
/// what the members give to their dK and dV, until these come home; or Q, dO and Stats do, and the
/// sums of dQ: whichever is fewer bytes. Where heads are packed or sums rounded on the wire each
/// member sends what it gives straight home instead. `mine` are the slots of what the member starts
/// with. Of the work on its own keys a member keeps half for the end, while its sums come home.
/// `meanwhile`, if there is one, writes other work, behind the first half.
void circulate_backward(Writer& me, const std::vector<int>& ring, const AttendBackward& mine,
                        const Held& held, const std::function<void()>& meanwhile = {},
                        const StandsFor& stands_for = {});

/// Homes of what goes around. Inputs have two each, one in use while the other fills; sums two for
/// what is computed here, one being sent while the other is added to, and one for what arrives from
/// the left meanwhile.
struct RingHomes {
  struct OfStrip {
    std::array<AttendBackward, 2> turns{};
    AttendBackward arrival{};
  };
  std::vector<OfStrip> strips;  ///< none before the first round
};
/// Slots of a backward pass: of each strip, or one set that has all of them.
using StripSlots = std::vector<AttendBackward>;
/// The same for a rank that goes round more than once, always with the same side and Homes, and
/// does more at each stop than attend: `visit` is to add all that the slots it gets give to the
/// gradients among them; at the first stop it gets `mine`. What `mine` has of the side must lie in
/// other homes. `at_last`, if there is one, writes work of the rank's own that waits until the sums
/// are on their way home. @pre `strips` are of that side
void circulate_backward(Writer& me, const Strips& strips, const Side& side, const StripSlots& mine,
                        RingHomes& homes, const std::function<void(const StripSlots&)>& visit,
                        const std::function<void()>& at_last = {});

/// Moves a tensor among the ranks of `group` from the Blocks `from` to the Blocks `to` (one a
/// member): messages are their intersections, a member's own part too (it costs a copy, no wire).
/// The member's own Blocks lie in the slots `source` and `target`. May replicate.
void redistribute(Writer& me, const std::vector<int>& group, const std::vector<Block>& from,
                  const std::vector<Block>& to, SlotId source, SlotId target);

/// As redistribute() for a sum: where several members hold something for the same place of a `to`,
/// it is added up, in an order that the group fixes. @pre `target` holds zeros
void collect(Writer& me, const std::vector<int>& group, const std::vector<Block>& from,
             const std::vector<Block>& to, SlotId source, SlotId target);

/// Fetches from every rank just the keys that the own queries see, nearest ranks first, and
/// attends to each rank's keys while the next ones are on their way; see pull.hpp.
void pull(Writer& me, SlotId q, SlotId k, SlotId v, SlotId out);

/// The backward pass of pull(): what the own queries give to dK and dV of another rank's keys goes
/// back to that rank, for just the keys that were fetched, while the next are computed. Or the
/// queries, dO and Stats that see the own keys are fetched, and dQ goes back: whichever is fewer
/// bytes for all ranks together; the Program's note says why.
void pull_backward(Writer& me, AttendBackward mine);

}  // namespace dattn
