#pragma once

#include "parallel/strategies.hpp"

namespace dattn {
/// Every rank holds all queries and its share of the keys; one all-reduce merges the Partials.
Strategy tree_strategy();
}  // namespace dattn
