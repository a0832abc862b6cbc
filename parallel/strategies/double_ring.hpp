#pragma once

#include "parallel/strategies.hpp"

namespace dattn {

Strategy double_ring_strategy();

}  // namespace dattn
