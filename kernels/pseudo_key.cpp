#include "kernels/pseudo_key.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/check.hpp"
#include "kernels/dot.hpp"
#include "kernels/partial.hpp"

namespace dattn {

template <class T>
void add_rows(View<const T> view, std::span<const Index> heads, const Ranges& rows, double* sums,
              Index stride) {
  for (const Range range : rows) {
    for (Index row = range.begin; row < range.end; ++row) {
      double* sum = sums;
      for (const Index head : heads) {
        const T* numbers = view.at(row, head);
        for (Index i = 0; i < view.dim; ++i) sum[i] += static_cast<double>(numbers[i]);
        sum += stride;
      }
    }
  }
}

template <class E>
void attend_pseudo_keys(View<const E> q, const PseudoKeys<SumOf<E>>& pseudo, View<SumOf<E>> out,
                        const Score& score, int threads) {
  using Sum = SumOf<E>;
  const Index count = std::ssize(pseudo.counts);
  const Index d_v = pseudo.values.dim;
  CHECK(!score.sigmoid && score.alibi.empty() && score.bias.empty(), score.sigmoid,
        score.alibi.size(), score.bias.size());
  CHECK(out.rows == q.rows && out.heads == q.heads && out.dim == record_length(d_v), out.rows,
        out.heads, out.dim);
  CHECK(q.dim == pseudo.keys.dim && pseudo.keys.rows == count && pseudo.values.rows == count, q.dim,
        pseudo.keys.dim, pseudo.keys.rows, pseudo.values.rows);
  std::vector<double> log_weights;
  for (const Index n : pseudo.counts) log_weights.push_back(std::log(static_cast<double>(n)));
#pragma omp parallel num_threads(threads)
  {
    std::vector<double> scores(log_weights.size());
    std::vector<double> sums(static_cast<std::size_t>(d_v));
    std::vector<Sum> record(static_cast<std::size_t>(out.dim));
#pragma omp for schedule(static) collapse(2)
    for (Index row = 0; row < q.rows; ++row) {
      for (Index head = 0; head < q.heads; ++head) {
        double top = -std::numeric_limits<double>::infinity();
        for (std::size_t n = 0; n < scores.size(); ++n) {
          const Sum* key = pseudo.keys.at(static_cast<Index>(n), 0);
          scores[n] =
              score_of(score, 0, 0, 0, dot(q.at(row, head), key, q.dim), log_weights[n]).value;
          top = std::max(top, scores[n]);
        }
        record[0] = static_cast<Sum>(top);
        // Weights are relative to the maximum that the record holds, rounded. Scores of -inf only:
        // every weight is 0, as that of no key.
        const bool none = top == -std::numeric_limits<double>::infinity();
        const double base = none ? 0.0 : static_cast<double>(record[0]);
        double total = 0;
        std::fill(sums.begin(), sums.end(), 0.0);
        for (std::size_t n = 0; n < scores.size(); ++n) {
          const double weight = std::exp(scores[n] - base);
          const Sum* value = pseudo.values.at(static_cast<Index>(n), 0);
          total += weight;
          for (std::size_t i = 0; i < sums.size(); ++i) {
            sums[i] += weight * static_cast<double>(value[i]);
          }
        }
        record[1] = static_cast<Sum>(total);
        for (std::size_t i = 0; i < sums.size(); ++i) record[2 + i] = static_cast<Sum>(sums[i]);
        merge(record.data(), out.at(row, head), 1, out.dim);
      }
    }
  }
}

#define DATTN_FOR(E)                                                                            \
  template void add_rows(View<const E>, std::span<const Index>, const Ranges&, double*, Index); \
  template void attend_pseudo_keys(View<const E>, const PseudoKeys<SumOf<E>>&, View<SumOf<E>>,  \
                                   const Score&, int);
DATTN_FOR(float)
DATTN_FOR(double)
DATTN_FOR(BFloat16)
#undef DATTN_FOR

}  // namespace dattn
