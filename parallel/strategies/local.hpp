#pragma once

#include "parallel/strategies.hpp"

namespace dattn {
/// One rank computes everything.
Strategy local_strategy();
}  // namespace dattn
