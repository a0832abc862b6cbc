#pragma once

#include <span>

#include "kernels/bfloat.hpp"
#include "kernels/view.hpp"

namespace dattn {

/// Fills the Stats [rows, heads, 2] of a backward Program: of each row and head LSE, and delta, the
/// sum of dO * O. `o` and `d_o` [rows, heads, d_v] and `lse` [rows, heads] are those of the same
/// rows, dense; O and LSE are what forward runs deliver. E is the element type of dO.
/// @pre equal extents
template <class E>
void fill_stats(View<const SumOf<E>> o, std::span<const SumOf<E>> lse, View<const E> d_o,
                View<SumOf<E>> stats, int threads = 1);

}  // namespace dattn
