#pragma once

#include <span>
#include <vector>

#include "kernels/attend.hpp"
#include "parallel/plan.hpp"

namespace dattn {

/// Some neighbouring query heads that an Attend or an AttendBackward serves and what they read:
/// among all, and where they lie in its slots of queries, keys and values.
struct Served {
  Where where;
  Range q, k, v;
  std::vector<float> key_weights;  ///< what where.key_weights looks at
};

/// All that work on these slots serves. `key_weights` are of all keys, as EngineOptions has them,
/// or empty.
std::vector<Served> served(const Program& program, const Problem& problem, SlotId q, SlotId k,
                           SlotId v, std::span<const float> key_weights);

template <class S>
std::vector<Served> served(const Program& program, const Problem& problem, const S& step,
                           std::span<const float> key_weights) {
  return served(program, problem, step.q, step.k, step.v, key_weights);
}

}  // namespace dattn
