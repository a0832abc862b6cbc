#pragma once

#include <span>

#include "kernels/bfloat.hpp"
#include "kernels/score.hpp"
#include "kernels/view.hpp"

namespace dattn {

/// Keys and values of one head that stand for many: key i and value i are the means of counts[i]
/// keys and of their values.
template <class T>
struct PseudoKeys {
  View<const T> keys;             ///< [pseudo-keys, 1, d_qk]
  View<const T> values;           ///< [pseudo-keys, 1, d_v]
  std::span<const Index> counts;  ///< one a pseudo-key, each positive
};

/// sums[i * stride] ... += the rows `rows` (counted from 0) of head heads[i] of `view`, one row
/// after the other. Memory is read in its order, so heads that drop the same rows are best given
/// together.
/// @pre stride >= view.dim
template <class T>
void add_rows(View<const T> view, std::span<const Index> heads, const Ranges& rows, double* sums,
              Index stride);

/// out <- out merged with attention of q to pseudo-keys, which have no position: every row and head
/// of q sees all of them. A pseudo-key's weight is count * exp(score), as if ln(count) were added
/// to its score; everything is computed in double and rounded once, to the record. q [rows, heads,
/// d_qk], out [rows, heads, d_v + 2] (kernels/partial.hpp). The result does not depend on the
/// number of threads.
/// Source: the compensation token of RazorAttention (Tang et al. 2024).
/// @pre `score` is a softmax's, without rules that ask for positions (ALiBi, bias)
template <class E>
void attend_pseudo_keys(View<const E> q, const PseudoKeys<SumOf<E>>& pseudo, View<SumOf<E>> out,
                        const Score& score, int threads);

}  // namespace dattn
