#pragma once

#include "parallel/schedule.hpp"
#include "parallel/strategies.hpp"

namespace dattn {

/// The program of a rank that does its part of `schedule`, whoever made it: the inputs of a piece
/// travel one piece ahead, into homes that take turns, and sums that belong to another rank go
/// back to it.
Program follow(const Problem& problem, const Schedule& schedule, int rank, Pass pass);

Strategy lightseq_strategy();

}  // namespace dattn
