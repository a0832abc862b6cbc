#pragma once

#include <vector>

#include "kernels/mask.hpp"
#include "kernels/score.hpp"
#include "kernels/view.hpp"

namespace dattn {

/// O [d_v] and LSE of one (query, head).
struct ReferenceRow {
  std::vector<double> o;
  double lse = 0;
};

/// The judge: attention of one query row in double, by the textbook, asking the mask for every key.
/// q, k, v hold the whole tensors; `query` is the row of Q. No key: O = 0, LSE = -inf. Sigmoid
/// attention: LSE is the logarithm of the sum of the weights.
template <class T>
ReferenceRow reference_row(const Shape& shape, const Mask& mask, const Score& score,
                           View<const T> q, View<const T> k, View<const T> v, Index head,
                           Index query, View<const float> key_weights = {});

/// dQ [queries, query heads, d_qk], dK [keys, key heads, d_qk], dV [keys, value heads, d_v], dense.
struct ReferenceGradients {
  std::vector<double> dq, dk, dv;
};

/// The judge of gradients: of sum(dO * O), with every probability of a row in memory at once.
template <class T>
ReferenceGradients reference_gradients(const Shape& shape, const Mask& mask, const Score& score,
                                       View<const T> q, View<const T> k, View<const T> v,
                                       View<const T> d_o, View<const float> key_weights = {});

}  // namespace dattn
