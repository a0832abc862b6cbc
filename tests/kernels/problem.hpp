#pragma once

#include <cmath>
#include <limits>
#include <random>
#include <type_traits>

#include "kernels/attend.hpp"
#include "kernels/partial.hpp"
#include "kernels/reference.hpp"
#include "tests/normal.hpp"

namespace dattn {

/// Numbers of one tensor [rows, heads, dim].
template <class T>
struct Tensor {
  Tensor(Index rows_, Index heads_, Index dim_, T value = {})
      : rows(rows_),
        heads(heads_),
        dim(dim_),
        numbers(static_cast<std::size_t>(rows_ * heads_ * dim_), value) {}

  Index rows, heads, dim;
  std::vector<T> numbers;

  View<T> view() { return {numbers.data(), rows, heads, dim}; }
  View<const T> view() const { return {numbers.data(), rows, heads, dim}; }
  T& at(Index row, Index head, Index i) { return view().at(row, head)[i]; }
};

/// N(0, 1) in every element.
template <class T>
Tensor<T> random_tensor(Index rows, Index heads, Index dim, unsigned seed) {
  Tensor<T> tensor(rows, heads, dim);
  std::mt19937 random(seed);
  const NormalNumbers normal;
  for (T& x : tensor.numbers) x = static_cast<T>(normal(random));
  return tensor;
}

/// Q, K, V of a whole problem.
template <class T>
struct Problem {
  Shape shape;
  MaskPtr mask;
  Score score;
  Tensor<T> q, k, v;
  std::vector<float> key_weights = {};  ///< [keys, key heads] or empty

  View<const float> weights() const {
    if (key_weights.empty()) return {};
    return {key_weights.data(), shape.keys, shape.key_heads, 1};
  }
};

/// What sums over elements T are kept in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
Problem<T> random_problem(const Shape& shape, const std::string& mask) {
  return {shape,
          parse_mask(mask, shape),
          {.scale = 1.0 / std::sqrt(static_cast<double>(shape.d_qk))},
          random_tensor<T>(shape.queries, shape.query_heads, shape.d_qk, 1),
          random_tensor<T>(shape.keys, shape.key_heads, shape.d_qk, 2),
          random_tensor<T>(shape.keys, shape.value_heads, shape.d_v, 3)};
}

/// The part of `whole` at the rows `rows` and the heads `heads`; `first` is the position of row 0.
template <class T>
Tensor<T> cut(const Tensor<T>& whole, const Runs& rows, Range heads, Index first) {
  Tensor<T> out(size(rows), heads.size(), whole.dim);
  Index to = 0;
  for (const Run& run : rows) {
    for (Index i = 0; i < run.count; ++i, ++to) {
      for (Index h = heads.begin; h < heads.end; ++h) {
        const T* from = whole.view().at(run.at(i) - first, h);
        std::copy(from, from + whole.dim, out.view().at(to, h - heads.begin));
      }
    }
  }
  return out;
}

/// The whole problem as one block.
inline Where everything(const Shape& s) {
  return {s,
          {0, s.query_heads},
          {0, s.key_heads},
          {0, s.value_heads},
          {{s.first_query(), s.queries, 1}},
          {{0, s.keys, 1}}};
}

/// A block of `heads` and of rows of the problem, with just the key and value heads that it reads.
inline Where block(const Shape& s, Range heads, const Runs& queries, const Runs& keys) {
  return {s, heads, s.key_heads_of(heads), s.value_heads_of(heads), queries, keys};
}

/// A Partial of no key for the block `where`, whose sums of values are not zeros but infinity,
/// unless they are the result themselves.
template <class T>
Tensor<T> empty_partial(const Where& where, const Score& score = {}) {
  Tensor<T> out(size(where.queries), where.query_heads.size(), record_length(where.shape.d_v));
  if (score.sigmoid) {
    clear(out.view());
  } else {
    std::fill_n(out.view().data, out.view().size(), std::numeric_limits<T>::infinity());
    start(out.view());
  }
  return out;
}

/// out <- out merged with attention over the block `where` of `problem`.
template <class T>
void attend_block(const Problem<T>& problem, const Where& where, const Work& work,
                  Tensor<Sum<T>>& out) {
  const Tensor<T> q = cut(problem.q, where.queries, where.query_heads, problem.shape.first_query());
  const Tensor<T> k = cut(problem.k, where.keys, where.key_heads, 0);
  const Tensor<T> v = cut(problem.v, where.keys, where.value_heads, 0);
  attend(q.view(), k.view(), v.view(), out.view(), where, *problem.mask, work);
}

template <class T>
Tensor<Sum<T>> attend_whole(const Problem<T>& problem, Work work) {
  work.score = problem.score;
  Where where = everything(problem.shape);
  where.key_weights = problem.weights();
  auto out = empty_partial<Sum<T>>(where, problem.score);
  attend(problem.q.view(), problem.k.view(), problem.v.view(), out.view(), where, *problem.mask,
         work);
  return out;
}

/// O [rows, heads, d_v] and LSE [rows, heads] of a Partial.
template <class T>
struct Finished {
  explicit Finished(const Tensor<T>& partial)
      : o(partial.rows, partial.heads, partial.dim - 2), lse(partial.rows, partial.heads, 1) {
    finish(partial.view(), std::span<T>(o.numbers), std::span<T>(lse.numbers));
  }
  Tensor<T> o, lse;
};

/// How far a result is from the reference.
struct Distance {
  double o = 0;    ///< relative, in the Frobenius norm
  double lse = 0;  ///< the largest absolute one; infinite where only one side is -inf
};

/// Of a Partial over all keys, which holds the rows and heads of `where`; every `stride`-th row.
template <class T>
Distance distance(const Problem<T>& problem, const Where& where, const Tensor<Sum<T>>& partial,
                  Index stride = 1) {
  const Finished<Sum<T>> found(partial);
  double wrong = 0;
  double norm = 0;
  Distance out;
  Index row = 0;
  for (const Run& run : where.queries) {
    for (Index i = 0; i < run.count; ++i, ++row) {
      if (row % stride != 0) continue;
      for (Index h = 0; h < partial.heads; ++h) {
        const ReferenceRow right =
            reference_row<T>(problem.shape, *problem.mask, problem.score, problem.q.view(),
                             problem.k.view(), problem.v.view(), where.query_heads.begin + h,
                             run.at(i) - problem.shape.first_query(), problem.weights());
        for (Index d = 0; d < problem.shape.d_v; ++d) {
          const double r = right.o[static_cast<std::size_t>(d)];
          const double e =
              static_cast<double>(problem.score.sigmoid ? partial.view().at(row, h)[2 + d]
                                                        : found.o.view().at(row, h)[d]) -
              r;
          wrong += e * e;
          norm += r * r;
        }
        const auto lse = static_cast<double>(found.lse.view().at(row, h)[0]);
        const double gap = lse == right.lse ? 0.0 : std::abs(lse - right.lse);
        out.lse =
            std::max(out.lse, std::isnan(gap) ? std::numeric_limits<double>::infinity() : gap);
      }
    }
  }
  out.o = norm > 0 ? std::sqrt(wrong / norm) : std::sqrt(wrong);
  if (std::isnan(out.o)) out.o = std::numeric_limits<double>::infinity();
  return out;
}

}  // namespace dattn
