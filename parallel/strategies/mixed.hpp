#pragma once

#include "parallel/strategies.hpp"

namespace dattn {

/// Heads that see much by a ring of all ranks, the others whole on one rank each.
Strategy mixed_strategy();

}  // namespace dattn
