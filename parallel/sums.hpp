#pragma once

#include "comm/operation.hpp"
#include "parallel/block.hpp"

namespace dattn {

/// How ranks' sums of this kind become one in a collective: Partials by the (O, LSE) rule,
/// gradients by addition. `type` is the Problem's. @pre is_sum(kind)
comm::Operation sum_rule(Kind kind, Type type);

/// inout[i] += in[i].
template <class E>
void add_numbers(const E* in, E* inout, Index count) {
  for (Index i = 0; i < count; ++i) inout[i] += in[i];
}

}  // namespace dattn
