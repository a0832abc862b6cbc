#pragma once

#include <cstdint>
#include <string>

#include "parallel/plan.hpp"

namespace dattn {

/// When messages move, between the moment they may and the moment they must.
enum class Weather {
  Late,      ///< only when no rank can take a step
  Early,     ///< as soon as both sides are posted
  Buffered,  ///< a send copies its data where it stands, and is done
  Random,    ///< any time in between
};

/// Executes a Plan on one thread, on numbers in memory laid out as an engine's, and says how it
/// went wrong: empty if every result, and all that is kept, is right. An oracle for rehearse() that
/// shares no code with it.
///
/// Every input number names its place in its tensor, a pair adds a hash of the numbers that it read
/// to its query's record or to its three gradients, and results are compared with the sum over the
/// allowed pairs. So data that is late, lost, stale, doubled or misplaced shows in some sum. Memory
/// starts as noise, and so does what a Recv waits for.
std::string interpret(const Problem& problem, const Plan& plan, Weather weather,
                      std::uint64_t seed);

}  // namespace dattn
