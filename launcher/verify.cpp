#include "launcher/verify.hpp"

#include <array>
#include <cmath>
#include <limits>

#include "launcher/verify_rows.hpp"

namespace dattn {

using namespace checking;

template <class T>
Verdict verify(comm::Communicator& world, const Problem& problem, const Block& delivers,
               const Source& source, const Scoring& scoring, std::span<const T> o,
               std::span<const T> lse) {
  const Shape& shape = problem.shape();
  const auto heads = static_cast<std::size_t>(shape.query_heads);
  const auto d_v = static_cast<std::size_t>(shape.d_v);
  const Runs positions = problem.queries().positions(delivers.rows);
  const double work = static_cast<double>(shape.keys) * static_cast<double>(shape.query_heads) *
                      static_cast<double>(shape.d_qk + shape.d_v);
  const std::vector<Index> rows = sample(size(positions), work);

  const std::vector<RowSum> sums = sums_of<T>(problem, source, scoring, positions, rows);

  std::array<double, 3> totals{static_cast<double>(rows.size()), 0, 0};  // rows, |error|^2, |ref|^2
  std::array<double, 2> worst{0, 0};                                     // LSE error, not finite
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::size_t h = 0; h < heads; ++h) {
      const RowSum& sum = sums[i * heads + h];
      const std::size_t record = static_cast<std::size_t>(rows[i]) * heads + h;
      const bool none = sum.weight == 0;
      for (std::size_t n = 0; n < d_v; ++n) {
        const double want = none ? 0.0 : sum.values[n] / divisor_of(scoring.score, sum);
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
  const Type precision = precision_of(problem);
  verdict.epsilon = epsilon_of(precision);
  verdict.residual = std::max(verdict.relative_error, verdict.lse_error) / verdict.epsilon;
  // float32: 8 * 2^-23 = 0.95e-6, below the 1e-6 that kernels/README.md promises. In double both
  // sides sum in the same precision, so the bound is wider in units.
  verdict.threshold = precision == Type::bf16 ? 0.5 : precision == Type::f4 ? 8 : 100;
  return verdict;
}

template Verdict verify(comm::Communicator&, const Problem&, const Block&, const Source&,
                        const Scoring&, std::span<const float>, std::span<const float>);
template Verdict verify(comm::Communicator&, const Problem&, const Block&, const Source&,
                        const Scoring&, std::span<const double>, std::span<const double>);

}  // namespace dattn
