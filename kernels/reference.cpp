#include "kernels/reference.hpp"

#include <cmath>
#include <limits>

namespace dattn {

template <class T>
ReferenceRow reference_row(const Shape& shape, const Mask& mask, double scale, View<const T> q,
                           View<const T> k, View<const T> v, Index head, Index query) {
  const T* q_row = q.at(query, head);
  std::vector<Index> keys;
  std::vector<double> scores;
  double top = -std::numeric_limits<double>::infinity();
  for (Index j = 0; j < shape.keys; ++j) {
    if (!mask.allows(head, query + shape.first_query(), j)) continue;
    const T* k_row = k.at(j, shape.key_head(head));
    double dot = 0;
    for (Index i = 0; i < shape.d_qk; ++i) {
      dot += static_cast<double>(q_row[i]) * static_cast<double>(k_row[i]);
    }
    keys.push_back(j);
    scores.push_back(scale * dot);
    top = std::max(top, scores.back());
  }
  ReferenceRow row{std::vector<double>(static_cast<std::size_t>(shape.d_v), 0.0), top};
  if (keys.empty()) return row;
  // Scores of -inf only: every weight is 0, as that of no key.
  if (top == -std::numeric_limits<double>::infinity()) top = 0;
  double sum = 0;
  for (std::size_t n = 0; n < keys.size(); ++n) {
    const double p = std::exp(scores[n] - top);
    const T* v_row = v.at(keys[n], shape.value_head(head));
    for (std::size_t i = 0; i < row.o.size(); ++i) row.o[i] += p * static_cast<double>(v_row[i]);
    sum += p;
  }
  if (sum == 0) return {std::vector<double>(row.o.size(), 0.0), row.lse};
  for (double& o : row.o) o /= sum;
  row.lse = top + std::log(sum);
  return row;
}

template ReferenceRow reference_row(const Shape&, const Mask&, double, View<const float>,
                                    View<const float>, View<const float>, Index, Index);
template ReferenceRow reference_row(const Shape&, const Mask&, double, View<const double>,
                                    View<const double>, View<const double>, Index, Index);

}  // namespace dattn
