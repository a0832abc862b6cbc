#include "kernels/reference.hpp"

#include <cmath>
#include <limits>

#include "kernels/bfloat.hpp"
#include "kernels/dot.hpp"

namespace dattn {
namespace {

/// A key that a query row sees.
struct Seen {
  Index key;
  ScoreValue score;
  double weight = 0;  ///< of softmax: normalised
};

struct Row {
  std::vector<Seen> keys;
  double lse = -std::numeric_limits<double>::infinity();
};

template <class T>
Row row_of(const Shape& shape, const Mask& mask, const Score& score, View<const T> q,
           View<const T> k, Index head, Index query, View<const float> key_weights) {
  Row row;
  const T* q_row = q.at(query, head);
  const Index position = query + shape.first_query();
  double top = -std::numeric_limits<double>::infinity();
  for (Index j = 0; j < shape.keys; ++j) {
    if (!mask.allows(head, position, j)) continue;
    const double product = dot(q_row, k.at(j, shape.key_head(head)), shape.d_qk);
    const double weight = key_weights.data == nullptr
                              ? 0.0
                              : static_cast<double>(*key_weights.at(j, shape.key_head(head)));
    row.keys.push_back({j, score_of(score, head, position, j, product, weight)});
    top = std::max(top, row.keys.back().score.value);
  }
  // Scores of -inf only: every weight is 0, as that of no key.
  if (top == -std::numeric_limits<double>::infinity() || score.sigmoid) top = 0;
  double sum = 0;
  for (Seen& s : row.keys) {
    s.weight = score.sigmoid ? 1 / (1 + std::exp(-s.score.value)) : std::exp(s.score.value - top);
    sum += s.weight;
  }
  if (row.keys.empty() || sum == 0) return {};
  row.lse = top + std::log(sum);
  if (score.sigmoid) return row;
  for (Seen& s : row.keys) s.weight /= sum;
  return row;
}

}  // namespace

template <class T>
ReferenceRow reference_row(const Shape& shape, const Mask& mask, const Score& score,
                           View<const T> q, View<const T> k, View<const T> v, Index head,
                           Index query, View<const float> key_weights) {
  const Row row = row_of(shape, mask, score, q, k, head, query, key_weights);
  ReferenceRow out{std::vector<double>(static_cast<std::size_t>(shape.d_v), 0.0), row.lse};
  for (const Seen& s : row.keys) {
    const T* v_row = v.at(s.key, shape.value_head(head));
    for (std::size_t i = 0; i < out.o.size(); ++i) {
      out.o[i] += s.weight * static_cast<double>(v_row[i]);
    }
  }
  return out;
}

template <class T>
ReferenceGradients reference_gradients(const Shape& shape, const Mask& mask, const Score& score,
                                       View<const T> q, View<const T> k, View<const T> v,
                                       View<const T> d_o, View<const float> key_weights) {
  const auto zeros = [](Index n) { return std::vector<double>(static_cast<std::size_t>(n), 0.0); };
  ReferenceGradients out{zeros(q.size()), zeros(k.size()), zeros(v.size())};
  const View<double> dq{out.dq.data(), q.rows, q.heads, q.dim};
  const View<double> dk{out.dk.data(), k.rows, k.heads, k.dim};
  const View<double> dv{out.dv.data(), v.rows, v.heads, v.dim};
  for (Index h = 0; h < shape.query_heads; ++h) {
    const Index kh = shape.key_head(h);
    const Index vh = shape.value_head(h);
    for (Index query = 0; query < shape.queries; ++query) {
      const Row row = row_of(shape, mask, score, q, k, h, query, key_weights);
      const T* g = d_o.at(query, h);
      std::vector<double> dp;
      double mean = 0;
      for (const Seen& s : row.keys) {
        dp.push_back(dot(g, v.at(s.key, vh), shape.d_v));
        mean += s.weight * dp.back();
        for (Index i = 0; i < shape.d_v; ++i) {
          dv.at(s.key, vh)[i] += s.weight * static_cast<double>(g[i]);
        }
      }
      for (std::size_t n = 0; n < row.keys.size(); ++n) {
        const Seen& s = row.keys[n];
        const double ds =
            (score.sigmoid ? s.weight * (1 - s.weight) * dp[n] : s.weight * (dp[n] - mean)) *
            s.score.slope * score.scale;
        for (Index i = 0; i < shape.d_qk; ++i) {
          dq.at(query, h)[i] += ds * static_cast<double>(k.at(s.key, kh)[i]);
          dk.at(s.key, kh)[i] += ds * static_cast<double>(q.at(query, h)[i]);
        }
      }
    }
  }
  return out;
}

#define DATTN_FOR(T)                                                                           \
  template ReferenceRow reference_row(const Shape&, const Mask&, const Score&, View<const T>,  \
                                      View<const T>, View<const T>, Index, Index,              \
                                      View<const float>);                                      \
  template ReferenceGradients reference_gradients(const Shape&, const Mask&, const Score&,     \
                                                  View<const T>, View<const T>, View<const T>, \
                                                  View<const T>, View<const float>);
DATTN_FOR(float)
DATTN_FOR(double)
DATTN_FOR(BFloat16)
#undef DATTN_FOR

}  // namespace dattn
