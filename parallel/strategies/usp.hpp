#pragma once

#include "parallel/strategies.hpp"

namespace dattn {
/// A 2-D mesh: heads are split inside each group of neighbouring ranks, a ring runs between groups.
Strategy usp_strategy();
Strategy usp_inner_ring_strategy();
}  // namespace dattn
