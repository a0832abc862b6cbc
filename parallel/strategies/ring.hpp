#pragma once

#include "parallel/strategies.hpp"

namespace dattn {
/// Every rank keeps its queries; keys and values go once around the ring of all ranks.
Strategy ring_strategy();
}  // namespace dattn
