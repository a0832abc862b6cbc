// Layers of latent attention for tests: sizes, inputs, and the layer in its two forms.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/latent/attention.hpp"
#include "kernels/latent/operators.hpp"
#include "kernels/latent/reference.hpp"
#include "kernels/latent/weights.hpp"
#include "kernels/mask.hpp"
#include "kernels/partial.hpp"
#include "tests/kernels/problem.hpp"

namespace dattn {

struct LatentCase {
  std::string name;
  LatentSizes sizes;
  Index tokens;
  Index queries;
};

constexpr Rope kStretched{
    .base = 1000, .factor = 8, .original = 64, .mscale = 1, .mscale_all_dim = 0.7};

/// Odd sizes, with and without compressed queries, few rows (decode) and many, YaRN.
inline const std::vector<LatentCase>& latent_cases() {
  static const std::vector<LatentCase> table{
      {"one token", {.model = 5, .kv_rank = 3, .d_nope = 1, .d_rope = 2, .d_v = 1}, 1, 1},
      {"no q rank",
       {.model = 37, .heads = 3, .kv_rank = 13, .d_nope = 7, .d_rope = 6, .d_v = 5},
       29,
       29},
      {"q rank",
       {.model = 41, .heads = 5, .q_rank = 11, .kv_rank = 16, .d_nope = 9, .d_rope = 4, .d_v = 12},
       70,
       3},
      {"yarn",
       {.model = 64,
        .heads = 17,
        .q_rank = 24,
        .kv_rank = 32,
        .d_nope = 16,
        .d_rope = 10,
        .d_v = 8,
        .rope = kStretched},
       131,
       9},
      {"16 lanes",
       {.model = 33,
        .heads = 4,
        .kv_rank = 64,
        .d_nope = 16,
        .d_rope = 8,
        .d_v = 16,
        .rope = kStretched,
        .epsilon = 1e-3},
       300,
       4},
  };
  return table;
}

inline Tensor<float> latent_input(const LatentSizes& sizes, Index tokens) {
  return random_tensor<float>(tokens, 1, sizes.model, 11);
}

inline View<const float> rows_of(View<const float> x, Range rows) {
  return {x.at(rows.begin, 0), rows.size(), x.heads, x.dim, x.row_stride()};
}

/// y [queries, 1, model] of these heads in the absorbed form, from a cache of elements T.
template <class T>
Tensor<float> absorbed_layer(const LatentWeights& w, Range heads, View<const float> x,
                             Index queries, const Work& work) {
  const LatentSizes& s = w.sizes;
  const Index tokens = x.rows;
  const Index latent = w.part.latent.size();
  Tensor<T> cache(tokens, 1, latent + s.d_rope);
  latent_rows(w, x, {{0, tokens, 1}}, cache.view(), work);
  const Shape shape = absorbed_shape(s, queries, tokens, latent);
  const Runs positions{{shape.first_query(), queries, 1}};
  Tensor<T> q(queries, heads.size(), latent + s.d_rope);
  absorbed_queries(w, heads, rows_of(x, {tokens - queries, tokens}), positions, q.view(), work);
  Tensor<float> records(queries, heads.size(), latent + 2);
  clear(records.view());
  const Where where{shape, heads, {0, 1}, {0, 1}, positions, {{0, tokens, 1}}};
  attend_latent<T>(q.view(), cache.view(), records.view(), where, *parse_mask("causal", shape),
                   scaled(work, s));
  Tensor<float> o(queries, heads.size(), latent);
  std::vector<float> lse(static_cast<std::size_t>(queries * heads.size()));
  finish(View<const float>(records.view()), std::span(o.numbers), std::span(lse));
  Tensor<float> y(queries, 1, s.model);
  values_out(w, heads, o.view(), y.view(), work);
  return y;
}

/// The same in the expanded form.
template <class T>
Tensor<float> expanded_layer(const LatentWeights& w, Range heads, View<const float> x,
                             Index queries, const Work& work) {
  const LatentSizes& s = w.sizes;
  const Index tokens = x.rows;
  const Shape shape = expanded_shape(s, queries, tokens);
  const Runs positions{{shape.first_query(), queries, 1}};
  Tensor<T> cache(tokens, 1, s.row());
  latent_rows(w, x, {{0, tokens, 1}}, cache.view(), work);
  Tensor<float> k(tokens, heads.size(), s.d_qk());
  Tensor<float> v(tokens, heads.size(), s.d_v);
  expand<T>(w, heads, cache.view(), k.view(), v.view(), work);
  Tensor<float> c_q(queries, 1, s.q_width());
  compressed_queries(w, rows_of(x, {tokens - queries, tokens}), c_q.view(), work);
  Tensor<float> q(queries, heads.size(), s.d_qk());
  expanded_queries(w, heads, c_q.view(), positions, q.view(), work);
  Tensor<float> records(queries, heads.size(), s.d_v + 2);
  clear(records.view());
  const Where where{shape, heads, heads, heads, positions, {{0, tokens, 1}}};
  attend(View<const float>(q.view()), View<const float>(k.view()), View<const float>(v.view()),
         records.view(), where, *parse_mask("causal", shape), scaled(work, s));
  Tensor<float> o(queries, heads.size(), s.d_v);
  std::vector<float> lse(static_cast<std::size_t>(queries * heads.size()));
  finish(View<const float>(records.view()), std::span(o.numbers), std::span(lse));
  Tensor<float> y(queries, 1, s.model);
  project_out(w, heads, o.view(), y.view(), work);
  return y;
}

/// Relative error in the Frobenius norm.
template <class A, class B>
double relative_error(const A& a, const B& b) {
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    error += d * d;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(error / norm);
}

}  // namespace dattn
