#pragma once

#include "parallel/strategies.hpp"

namespace dattn {
/// Every rank fetches just the keys that its queries can see, straight from their owners.
Strategy gather_strategy();
}  // namespace dattn
