#pragma once

#include <vector>

#include "kernels/mask.hpp"
#include "kernels/view.hpp"

namespace dattn {

/// O [d_v] and LSE of one (query, head).
struct ReferenceRow {
  std::vector<double> o;
  double lse = 0;
};

/// The judge: softmax attention of one query row in double, by the textbook, asking the mask for
/// every key. q, k, v hold the whole tensors; `query` is the row of Q. No key: O = 0, LSE = -inf.
template <class T>
ReferenceRow reference_row(const Shape& shape, const Mask& mask, double scale, View<const T> q,
                           View<const T> k, View<const T> v, Index head, Index query);

}  // namespace dattn
