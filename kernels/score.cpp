#include "kernels/score.hpp"

#include <algorithm>
#include <cmath>

namespace dattn {

ScoreValue score_of(const Score& score, Index head, Index query, Index key, double dot,
                    double log_weight) {
  ScoreValue out{score.scale * dot, 1.0};
  if (score.soft_cap > 0) {
    const double t = std::tanh(out.value / score.soft_cap);
    out = {score.soft_cap * t, 1.0 - t * t};
  }
  if (!score.alibi.empty()) {
    out.value -= static_cast<double>(score.alibi[static_cast<std::size_t>(head)]) *
                 static_cast<double>(std::abs(key - query));
  }
  if (!score.bias.empty()) {
    const Index at = std::clamp(key - query, -score.reach, score.reach) + score.reach;
    out.value += static_cast<double>(
        score.bias[static_cast<std::size_t>(head * (2 * score.reach + 1) + at)]);
  }
  out.value += log_weight;
  if (score.sigmoid) out.value += score.shift;
  return out;
}

}  // namespace dattn
