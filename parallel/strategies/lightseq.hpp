#pragma once

#include "parallel/schedule.hpp"
#include "parallel/strategies.hpp"

namespace dattn {

/// The program of a rank that does its part of `schedule`, whoever made it: the operands of a piece
/// travel one piece ahead, into homes that take turns, and what is computed for another rank goes
/// back to it.
Program follow(const Problem& problem, const Schedule& schedule, int rank);

Strategy lightseq_strategy();

}  // namespace dattn
