#pragma once

#include "parallel/plan.hpp"

namespace dattn {

/// Which of the things that an engine takes for granted this Program, the `rank`-th of its Plan,
/// breaks whatever the order of events: slots, homes, kinds, operands, writes into inputs. Null if
/// none. Written without a look at rehearse(), for the interpreter.
const char* illegal(const Problem& problem, const Program& program, int rank);

}  // namespace dattn
