#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace dattn {

/// One (query, head) of a check, as the textbook has it: sums in double over the keys as they come.
struct RowSum {
  double top = -std::numeric_limits<double>::infinity();  ///< of the scores
  double weight = 0;                                      ///< sum of exp(score - top)
  std::vector<double> values;                             ///< sum of exp(score - top) * value

  /// A key of value 0. Returns exp(score - top).
  double add(double score) {
    if (score > top) {
      const double shrink = std::exp(top - score);
      weight *= shrink;
      for (double& x : values) x *= shrink;
      top = score;
    }
    const double w = std::exp(score - top);
    weight += w;
    return w;
  }
  template <class T>
  void add(double score, const T* value) {
    const double w = add(score);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] += w * static_cast<double>(value[i]);
  }
};

}  // namespace dattn
