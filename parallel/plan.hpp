#pragma once

#include <span>
#include <string>
#include <variant>
#include <vector>

#include "parallel/block.hpp"
#include "parallel/problem.hpp"
#include "parallel/reduction.hpp"

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

/// dq, dk, dv <- themselves plus the gradients, under the Problem's mask, of what the keys k, v
/// give to the queries q. `stats` are of all keys, not only of these.
struct AttendBackward {
  SlotId q, k, v, d_o, stats, dq, dk, dv;
};

/// The slot of an AttendBackward that is of this kind. @pre not O
SlotId& operand(AttendBackward& step, Kind kind);

/// into <- into merged with from, a Partial of the same Block or of a part of it.
struct Merge {
  SlotId from, into;
};

/// into <- into plus from, gradients; the Block of `from` is all or part of that of `into`.
struct Add {
  SlotId from, into;
};

/// On every rank along `axis`: slot <- all their slots merged (Partials) or added up (gradients).
/// One collective.
struct Reduce {
  SlotId slot;
  int axis;
};

/// slot <- over no pair: Partials of no key, gradients of zeros. For sums that take turns in a
/// home; the first slot of a home starts so by itself.
struct Clear {
  SlotId slot;
};

/// What a rank does. Steps are taken in order; a Send or a Recv is posted where it stands, and
/// awaited at the first later step that its slot's home is in conflict with.
using Step = std::variant<Send, Recv, Attend, AttendBackward, Merge, Add, Reduce, Clear>;

/// What a rank delivers: in the end `slot` holds the final numbers of `block`.
struct Result {
  SlotId slot = 0;
  Block block;
};

/// One rank's Slots and Steps. The slots `inputs` are filled beforehand, one of each of
/// input_kinds; of the others, the first of each home starts over no pair if it is a sum.
/// `results` has one of each of result_kinds. What a forward Program has in `kept`, of Q, K and V
/// one Block each at most, is whole at its end, for the backward Program to start with.
struct Program {
  int rank = 0;
  Pass pass = Pass::forward;
  std::vector<Slot> slots;
  std::vector<Step> steps;
  int homes = 0;
  std::vector<SlotId> inputs;
  std::vector<Result> results;
  std::vector<SlotId> kept;
  std::string note;  ///< what the strategy chose and why, for people; may be empty

  /// The input, or the result, of this kind. @pre there is one
  SlotId input(Kind kind) const;
  const Result& result(Kind kind) const;
};

/// The Programs of all ranks, by rank.
using Plan = std::vector<Program>;

/// Bytes of each home of the program: its largest slot.
std::vector<Index> home_bytes(const Program& program, const Problem& problem);
/// Bytes of all that an Engine holds for the program, the Problem's pseudo-keys included.
Index memory_bytes(const Program& program, const Problem& problem);
/// Bytes of what the program keeps, of these.
Index kept_bytes(const Program& program, const Problem& problem);

/// Whether Blocks of this kind are rounded on their way to another rank.
bool is_rounded(Kind kind, const Problem& problem);

/// Bytes of each home of the program for what lies rounded between home and wire: the messages that
/// leave or reach one slot may all be under way at once.
std::vector<Index> staging_bytes(const Program& program, const Problem& problem);

/// Size on the wire: that in memory, but of what is rounded two bytes a number, m and l apart.
Index wire_bytes(const Block& block, const Problem& problem);

/// Bytes that a Send puts on the wire; to the rank itself none.
Index wire_bytes(const Program& program, const Send& send, const Problem& problem);

/// How the ranks along the axis of a Reduce of `slot` sum it up, and the bytes of a record.
Reduction reduction(const Program& program, const Reduce& step, const Problem& problem);
Index record_bytes(const Program& program, const Reduce& step, const Problem& problem);

/// Bytes that the program's Reduces need beside the homes: the most that one does.
Index reduce_bytes(const Program& program, const Problem& problem);

/// One line: what the step does, in the words of the vocabulary.
std::string text(const Program& program, const Step& step);

/// The program, a line a step.
std::string text(const Program& program);

}  // namespace dattn
