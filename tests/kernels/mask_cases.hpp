#pragma once

#include <functional>
#include <string>
#include <vector>

#include "kernels/mask.hpp"

namespace dattn {

using Allowed = std::function<bool(Index head, Index query, Index key)>;

constexpr Index kKeys = 11;
constexpr Index kHeads = 3;

/// A mask in words, and a definition of it that shares nothing with it.
struct MaskCase {
  std::string spec;
  Allowed allowed;
  Index keys = kKeys;
  Index queries = 0;  ///< where the mask takes no other number
};

const std::vector<MaskCase>& mask_cases();

struct Sharded {
  Index block, local, stride, offset = 0, step = 1, dense = 0;
};
Allowed s2(Sharded s, Index heads_of_key = 1, Index key_heads = 3);

}  // namespace dattn
