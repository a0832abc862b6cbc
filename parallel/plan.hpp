#pragma once

#include <span>
#include <string>
#include <variant>
#include <vector>

#include "parallel/block.hpp"
#include "parallel/problem.hpp"

namespace dattn {

/// Index of a Slot in its Program.
using SlotId = int;

/// One Block in one rank's memory. Slots with the same home share its bytes in turn: filling one
/// empties the others (double buffering is two homes).
struct Slot {
  Block block;
  int home = 0;
};

/// Sends `block`, all or part of what `slot` holds, to `peer`. The slot is read until it is done.
struct Send {
  SlotId slot;
  Block block;
  int peer;
};

/// Receives `block`, all or part of `slot`, from `peer`. The slot is written until it is done.
struct Recv {
  SlotId slot;
  Block block;
  int peer;
};

/// out <- out merged with the attention of q to k, v under the Problem's mask. Where another slot
/// has the home of `out`, `out` takes it and starts over no key.
struct Attend {
  SlotId q, k, v, out;
};

/// into <- into merged with from, a Partial of the same Block or of a part of it.
struct Merge {
  SlotId from, into;
};

/// On every rank along `axis`: slot <- all their slots merged. One collective.
struct Reduce {
  SlotId slot;
  int axis;
};

/// What a rank does. Steps are taken in order; a Send or a Recv is posted where it stands, and
/// awaited at the first later step that its slot's home is in conflict with.
using Step = std::variant<Send, Recv, Attend, Merge, Reduce>;

/// One rank's Slots and Steps. Slots q, k and v are filled beforehand (they hold the inputs), slots
/// of kind O start over no key if they are the first in their home; in the end slot `out` holds the
/// final Partial of `delivers`.
struct Program {
  int rank = 0;
  std::vector<Slot> slots;
  std::vector<Step> steps;
  int homes = 0;
  SlotId q = 0, k = 0, v = 0, out = 0;
  Block delivers;
};

/// The Programs of all ranks, by rank.
using Plan = std::vector<Program>;

/// Bytes of each home of the program: its largest slot.
std::vector<Index> home_bytes(const Program& program, const Problem& problem);

/// Bytes that a Send puts on the wire; to the rank itself none.
Index wire_bytes(const Program& program, const Send& send, const Problem& problem);

/// Bytes that rank `rank` of `ranks` sends in an all-reduce of `records` records of `record_bytes`:
/// reduce-scatter and all-gather of equal parts, 2 (P-1)/P of the whole, the least there is. The
/// library may choose another way; this is the figure that plans and reports count.
Index reduce_bytes(Index records, Index record_bytes, Index ranks, Index rank);

/// One line: what the step does, in the words of the vocabulary.
std::string text(const Program& program, const Step& step);

/// The program, a line a step.
std::string text(const Program& program);

}  // namespace dattn
