#pragma once

#include <functional>
#include <vector>

#include "parallel/plan.hpp"

/// What of a Program need not move between ranks that see each other's memory. A rank lends bytes
/// that it does not write again before the end of its run; another may look at them instead of
/// receiving them where it only reads them, whole.
namespace dattn {

/// By slot: whether it may be looked at elsewhere instead of being received: it arrives in one
/// message, nothing on the rank writes to it, and nobody reads it after the run.
std::vector<bool> borrowable_slots(const Program& program);

/// By home: the last step that writes to it, -1 if none does. What the rank sends from it later
/// stays as it is until the end of the run. The results of a Problem that compensates are written
/// by the engine behind the last step.
std::vector<int> last_writes(const Program& program, const Problem& problem);

/// By home: whether ranks for which `sees` holds may be shown something in it, by this Program or,
/// of what it keeps, by the next.
std::vector<bool> homes_seen(const Program& program, const std::function<bool(int rank)>& sees);

}  // namespace dattn
