#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/dot.hpp"
#include "kernels/view.hpp"
#include "launcher/means.hpp"
#include "launcher/row_sum.hpp"
#include "launcher/verify.hpp"

/// What verify() and verify_gradients() share: which rows they compare, and those rows' sums.
namespace dattn::checking {

/// Multiply-adds that a rank spends on checking, and keys that it holds at a time.
inline constexpr double kBudget = 4e8;
inline constexpr Index kPiece = 512;

/// What results are as precise as.
inline Type precision_of(const Problem& problem) {
  return problem.wire() == Wire::bf16 ? Type::bf16 : problem.type();
}

/// From 1 to the next number of this type.
inline double epsilon_of(Type type) {
  return type == Type::bf16 ? 0x1p-7 : type == Type::f4 ? 0x1p-23 : 0x1p-52;
}

/// Rows of [0, count) to compare: all, or as many as the budget allows, first and last among them.
inline std::vector<Index> sample(Index count, double work_of_a_row) {
  const Index most = std::max<Index>(4, static_cast<Index>(kBudget / std::max(1.0, work_of_a_row)));
  std::vector<Index> rows;
  if (count <= most) {
    for (Index i = 0; i < count; ++i) rows.push_back(i);
  } else {
    for (Index i = 0; i < most; ++i) rows.push_back(i * (count - 1) / (most - 1));
  }
  return rows;
}

/// The rows `rows` (counted from 0) of those at `positions`, all their heads.
template <class T>
std::vector<T> rows_of(const Source& source, Kind kind, const Runs& positions,
                       const std::vector<Index>& rows) {
  const Index numbers = heads_of(kind, source.shape()) * dim_of(kind, source.shape());
  std::vector<T> out(rows.size() * static_cast<std::size_t>(numbers));
  T* to = out.data();
  for (const Index row : rows) {
    source.read(kind, part(positions, {row, row + 1}), to);
    to += numbers;
  }
  return out;
}

inline std::vector<Index> positions_of(const Runs& positions, const std::vector<Index>& rows) {
  std::vector<Index> at;
  for (const Index row : rows) at.push_back(part(positions, {row, row + 1}).front().first);
  return at;
}

/// Calls f(piece, K, V) with all keys, some at a time.
template <class T, class F>
void each_piece_of_keys(const Source& source, const F& f) {
  const Shape& shape = source.shape();
  std::vector<T> k(static_cast<std::size_t>(kPiece * shape.key_heads * shape.d_qk));
  std::vector<T> v(static_cast<std::size_t>(kPiece * shape.value_heads * shape.d_v));
  for (Index from = 0; from < shape.keys; from += kPiece) {
    const Run piece{from, std::min(kPiece, shape.keys - from), 1};
    source.read(Kind::K, {piece}, k.data());
    source.read(Kind::V, {piece}, v.data());
    f(piece, View<const T>{k.data(), piece.count, shape.key_heads, shape.d_qk},
      View<const T>{v.data(), piece.count, shape.value_heads, shape.d_v});
  }
}

/// The log-weight of a key, for a key head.
inline double log_weight(const Scoring& scoring, const Shape& shape, Index key, Index key_head) {
  if (scoring.key_weights.empty()) return 0;
  return static_cast<double>(
      scoring.key_weights[static_cast<std::size_t>(key * shape.key_heads + key_head)]);
}

/// The score whose exponential is the weight of a pair, before softmax divides by the sum.
inline double log_weight_of(const Score& score, double value) {
  if (!score.sigmoid) return value;
  return value > 0 ? -std::log1p(std::exp(-value)) : value - std::log1p(std::exp(value));
}

/// What a row's sums of values are divided by.
inline double divisor_of(const Score& score, const RowSum& sum) {
  return score.sigmoid ? std::exp(-sum.top) : sum.weight;
}

/// The sums of the rows `rows` of those at `positions`, by (row, head).
template <class T>
std::vector<RowSum> sums_of(const Problem& problem, const Source& source, const Scoring& scoring,
                            const Runs& positions, const std::vector<Index>& rows) {
  const Shape& shape = problem.shape();
  const auto heads = static_cast<std::size_t>(shape.query_heads);
  std::vector<RowSum> sums(
      rows.size() * heads,
      RowSum{.values = std::vector<double>(static_cast<std::size_t>(shape.d_v), 0.0)});
  if (rows.empty()) return sums;
  const std::vector<T> q = rows_of<T>(source, Kind::Q, positions, rows);
  const std::vector<Index> at = positions_of(positions, rows);
  Means means(problem);
  each_piece_of_keys<T>(source, [&](const Run& piece, View<const T> k, View<const T> v) {
    means.add(piece, k, v);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (std::size_t h = 0; h < heads; ++h) {
        const auto head = static_cast<Index>(h);
        const T* q_row = q.data() + (i * heads + h) * static_cast<std::size_t>(shape.d_qk);
        for (Index j = 0; j < piece.count; ++j) {
          if (!problem.mask().allows(head, at[i], piece.at(j))) continue;
          const Index key_head = shape.key_head(head);
          const double product = dot(q_row, k.at(j, key_head), shape.d_qk);
          const ScoreValue value = score_of(scoring.score, head, at[i], piece.at(j), product,
                                            log_weight(scoring, shape, piece.at(j), key_head));
          if (value.value == -std::numeric_limits<double>::infinity()) continue;
          sums[i * heads + h].add(log_weight_of(scoring.score, value.value),
                                  v.at(j, shape.value_head(head)));
        }
      }
    }
  });
  for (const Means::Mean& mean : std::move(means).finish()) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (Index head = mean.query_heads.begin; head < mean.query_heads.end; ++head) {
        const std::size_t record = i * heads + static_cast<std::size_t>(head);
        const T* q_row = q.data() + record * static_cast<std::size_t>(shape.d_qk);
        const double product = dot(q_row, mean.key.data(), shape.d_qk);
        sums[record].add(score_of(scoring.score, head, 0, 0, product, std::log(mean.count)).value,
                         mean.value.data());
      }
    }
  }
  for (std::size_t i = 0; !scoring.sinks.empty() && i < sums.size(); ++i) {
    sums[i].add(static_cast<double>(scoring.sinks[i % heads]));
  }
  return sums;
}

}  // namespace dattn::checking
