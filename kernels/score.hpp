#pragma once

#include <vector>

#include "kernels/range.hpp"

namespace dattn {

/// How a score is made of q.k. The parts apply in this order; those left out cost nothing.
///   s = scale * q.k
///   s = soft_cap * tanh(s / soft_cap)                            if soft_cap > 0 (Gemma 2)
///   s = s - alibi[head] * |key position - query position|        if given (Press et al. 2022)
///   s = s + bias[head][clamp(key - query, -reach, reach)]        if given (relative positions, T5)
///   s = s + log-weight of the key                                if where.key_weights is given
///   s = s + shift                                                sigmoid only (-ln keys, as a
///   rule)
/// Weights are then exp(s) over the sum of all (softmax) or 1 / (1 + exp(-s)), each by itself
/// (sigmoid, Ramapuram et al. 2024: partials add, and O is not divided by anything).
struct Score {
  double scale = 1.0;
  double soft_cap = 0.0;
  std::vector<float> alibi = {};  ///< one slope per query head of the whole problem, or empty
  Index reach = 0;                ///< of bias
  std::vector<float> bias = {};   ///< [query heads][2 * reach + 1], or empty
  double shift = 0.0;
  bool sigmoid = false;  ///< the normaliser: sigmoid instead of softmax
};

/// A score and its derivative by scale * q.k.
struct ScoreValue {
  double value;
  double slope;
};

/// The score of one pair in double, for reference loops: global query head, positions, q.k and the
/// log-weight of the key (0 where it has none).
ScoreValue score_of(const Score& score, Index head, Index query, Index key, double dot,
                    double log_weight);

}  // namespace dattn
