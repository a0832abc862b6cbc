#pragma once

#include <vector>

#include "kernels/mask.hpp"

namespace dattn {

/// Keys that no query sees any more with some key head and value head, and the query heads that
/// read these two.
struct Dropped {
  Range query_heads;
  Index key_head = 0;
  Index value_head = 0;
  Ranges keys;  ///< ascending positions, not empty
};

/// The *dropped* keys of each key head: those before the first of `queries` that none of `queries`
/// sees with any query head that reads the key head. A KV cache need not keep them, and all come
/// before all queries, so whatever stands for them may be seen by every query of a causal mask.
/// Heads of which nothing is dropped are left out. Where value heads differ in number from key
/// heads, there is one entry for each (key head, value head) that some query head reads, in the
/// order of query heads: the keys are those of the key head, whoever reads the value head besides.
std::vector<Dropped> dropped_keys(const Mask& mask, const Shape& shape, const Run& queries);

}  // namespace dattn
