#include "launcher/verify.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace dattn {
namespace {

/// Multiply-adds that a rank spends on checking, and keys that it holds at a time.
constexpr double kBudget = 4e8;
constexpr Index kPiece = 512;

/// One (query, head) as the textbook has it: sums in double over the keys as they come.
struct Sum {
  double top = -std::numeric_limits<double>::infinity();
  double weight = 0;
  std::vector<double> values;

  template <class T>
  void add(double score, const T* value) {
    if (score > top) {
      const double shrink = std::exp(top - score);
      weight *= shrink;
      for (double& x : values) x *= shrink;
      top = score;
    }
    const double w = std::exp(score - top);
    weight += w;
    for (std::size_t i = 0; i < values.size(); ++i) values[i] += w * static_cast<double>(value[i]);
  }
};

/// Rows of [0, count) to compare: all, or as many as the budget allows, first and last among them.
std::vector<Index> sample(Index count, double work_of_a_row) {
  const Index most = std::max<Index>(4, static_cast<Index>(kBudget / std::max(1.0, work_of_a_row)));
  std::vector<Index> rows;
  if (count <= most) {
    for (Index i = 0; i < count; ++i) rows.push_back(i);
  } else {
    for (Index i = 0; i < most; ++i) rows.push_back(i * (count - 1) / (most - 1));
  }
  return rows;
}

}  // namespace

template <class T>
Verdict verify(comm::Communicator& world, const Problem& problem, const Block& delivers,
               const Source& source, double scale, std::span<const T> o, std::span<const T> lse) {
  const Shape& shape = problem.shape();
  const auto heads = static_cast<std::size_t>(shape.query_heads);
  const auto d_v = static_cast<std::size_t>(shape.d_v);
  const Runs positions = problem.queries().positions(delivers.rows);
  const double work = static_cast<double>(shape.keys) * static_cast<double>(shape.query_heads) *
                      static_cast<double>(shape.d_qk + shape.d_v);
  const std::vector<Index> rows = sample(size(positions), work);

  std::vector<T> q(rows.size() * heads * static_cast<std::size_t>(shape.d_qk));
  std::vector<Index> at;  // position of each row
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Runs one = part(positions, {rows[i], rows[i] + 1});
    at.push_back(one.front().first);
    source.read(Kind::Q, one, q.data() + i * heads * static_cast<std::size_t>(shape.d_qk));
  }
  std::vector<Sum> sums(rows.size() * heads, Sum{.values = std::vector<double>(d_v, 0.0)});
  std::vector<T> k(static_cast<std::size_t>(kPiece * shape.key_heads * shape.d_qk));
  std::vector<T> v(static_cast<std::size_t>(kPiece * shape.value_heads * shape.d_v));
  for (Index from = 0; from < shape.keys && !rows.empty(); from += kPiece) {
    const Run piece{from, std::min(kPiece, shape.keys - from), 1};
    source.read(Kind::K, {piece}, k.data());
    source.read(Kind::V, {piece}, v.data());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (std::size_t h = 0; h < heads; ++h) {
        const auto head = static_cast<Index>(h);
        const T* q_row = q.data() + (i * heads + h) * static_cast<std::size_t>(shape.d_qk);
        for (Index j = 0; j < piece.count; ++j) {
          if (!problem.mask().allows(head, at[i], from + j)) continue;
          const T* k_row = k.data() + (j * shape.key_heads + shape.key_head(head)) * shape.d_qk;
          const T* v_row = v.data() + (j * shape.value_heads + shape.value_head(head)) * shape.d_v;
          double dot = 0;
          for (Index n = 0; n < shape.d_qk; ++n) {
            dot += static_cast<double>(q_row[n]) * static_cast<double>(k_row[n]);
          }
          sums[i * heads + h].add(scale * dot, v_row);
        }
      }
    }
  }

  std::array<double, 3> totals{static_cast<double>(rows.size()), 0, 0};  // rows, |error|^2, |ref|^2
  std::array<double, 2> worst{0, 0};                                     // LSE error, not finite
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::size_t h = 0; h < heads; ++h) {
      const Sum& sum = sums[i * heads + h];
      const std::size_t record = static_cast<std::size_t>(rows[i]) * heads + h;
      const bool none = sum.weight == 0;
      for (std::size_t n = 0; n < d_v; ++n) {
        const double want = none ? 0.0 : sum.values[n] / sum.weight;
        const auto got = static_cast<double>(o[record * d_v + n]);
        if (std::isfinite(want) != std::isfinite(got)) worst[1] = 1;
        if (!std::isfinite(want) || !std::isfinite(got)) continue;
        totals[1] += (got - want) * (got - want);
        totals[2] += want * want;
      }
      const double want =
          none ? -std::numeric_limits<double>::infinity() : sum.top + std::log(sum.weight);
      const auto got = static_cast<double>(lse[record]);
      if (none ? got != want : std::isfinite(want) != std::isfinite(got)) worst[1] = 1;
      if (std::isfinite(want) && std::isfinite(got)) {
        worst[0] = std::max(worst[0], std::abs(got - want) / std::max(1.0, std::abs(want)));
      }
    }
  }
  world.all_reduce_sum(totals);
  world.all_reduce_max(worst);

  Verdict verdict;
  verdict.rows = static_cast<Index>(totals[0]);
  verdict.relative_error = totals[1] == 0 ? 0 : std::sqrt(totals[1] / std::max(totals[2], 1e-300));
  verdict.lse_error = worst[0];
  verdict.finite = worst[1] == 0;
  verdict.epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  verdict.residual = std::max(verdict.relative_error, verdict.lse_error) / verdict.epsilon;
  // float32: 8 * 2^-23 = 0.95e-6, below the 1e-6 that kernels/README.md promises. In double both
  // sides sum in the same precision, so the bound is wider in units.
  verdict.threshold = sizeof(T) == 4 ? 8 : 100;
  return verdict;
}

template Verdict verify(comm::Communicator&, const Problem&, const Block&, const Source&, double,
                        std::span<const float>, std::span<const float>);
template Verdict verify(comm::Communicator&, const Problem&, const Block&, const Source&, double,
                        std::span<const double>, std::span<const double>);

}  // namespace dattn
