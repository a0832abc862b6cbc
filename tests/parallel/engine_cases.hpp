#pragma once

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/reference.hpp"
#include "parallel/engine.hpp"
#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"
#include "tests/cases.hpp"

namespace dattn::testing {

/// Q, K and V of a whole problem; every rank makes the same.
template <class T>
struct Tensors {
  std::vector<T> q, k, v;

  Tensors(const Shape& s, unsigned seed) {
    std::mt19937 bits(seed);
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<T>& to, Index count) {
      to.resize(static_cast<std::size_t>(count));
      for (T& x : to) x = static_cast<T>(normal(bits));
    };
    fill(q, s.queries * s.query_heads * s.d_qk);
    fill(k, s.keys * s.key_heads * s.d_qk);
    fill(v, s.keys * s.value_heads * s.d_v);
  }
};

/// What one rank found out about its own result.
struct Outcome {
  double error = 0;      ///< sum of squares against the reference
  double reference = 0;  ///< sum of squares of the reference
  double lse_error = 0;  ///< largest absolute
  bool rows_without_keys_are_empty = true;
  RunTimes times;
  std::vector<std::byte> bits;  ///< of O and LSE
};

/// Runs this rank's part of `problem` over `transport`, twice, and judges it by the reference.
template <class T, class Transport>
Outcome run_and_judge(const Problem& problem, const Strategy& strategy, Transport& transport,
                      const Tensors<T>& tensors, EngineOptions options) {
  const Shape& s = problem.shape();
  options.score.scale = 1 / std::sqrt(static_cast<double>(s.d_qk));
  const Program program = strategy.program(problem, transport.rank());
  Engine<Transport> engine(problem, program, transport, options);
  for (const auto& [slot, kind, all] :
       {std::tuple{program.q, Kind::Q, &tensors.q}, std::tuple{program.k, Kind::K, &tensors.k},
        std::tuple{program.v, Kind::V, &tensors.v}}) {
    const Block& block = program.slots[static_cast<std::size_t>(slot)].block;
    const Index row = heads_of(kind, s) * dim_of(kind, s);
    const bool query = kind == Kind::Q;
    T* to = reinterpret_cast<T*>(engine.input(slot).data());
    for (const Run& run : (query ? problem.queries() : problem.keys()).positions(block.rows)) {
      for (Index i = 0; i < run.count; ++i) {
        const Index from = run.at(i) - (query ? s.first_query() : 0);
        to = std::copy_n(all->data() + from * row, row, to);
      }
    }
  }
  const auto records = static_cast<std::size_t>(program.delivers.row_count() * s.query_heads);
  std::vector<T> o(records * static_cast<std::size_t>(s.d_v));
  std::vector<T> lse(records);
  Outcome outcome;
  for (int time = 0; time < 2; ++time) {  // the second run must not see the first
    outcome.times = engine.run();
    engine.result(std::span<T>(o), std::span<T>(lse));
    std::vector<std::byte> bits;
    for (const auto part : {std::as_bytes(std::span(o)), std::as_bytes(std::span(lse))}) {
      bits.insert(bits.end(), part.begin(), part.end());
    }
    if (time == 1 && bits != outcome.bits) outcome.lse_error = 1e9;  // not the same bits
    outcome.bits = std::move(bits);
  }
  const View<const T> q{tensors.q.data(), s.queries, s.query_heads, s.d_qk};
  const View<const T> k{tensors.k.data(), s.keys, s.key_heads, s.d_qk};
  const View<const T> v{tensors.v.data(), s.keys, s.value_heads, s.d_v};
  std::size_t record = 0;
  for (const Run& run : problem.queries().positions(program.delivers.rows)) {
    for (Index i = 0; i < run.count; ++i) {
      for (Index h = 0; h < s.query_heads; ++h, ++record) {
        const ReferenceRow want = reference_row(s, problem.mask(), options.score, q, k, v, h,
                                                run.at(i) - s.first_query());
        const auto got_lse = static_cast<double>(lse[record]);
        const bool none = want.lse == -std::numeric_limits<double>::infinity();
        for (std::size_t n = 0; n < want.o.size(); ++n) {
          const auto got = static_cast<double>(o[record * want.o.size() + n]);
          outcome.error += (got - want.o[n]) * (got - want.o[n]);
          outcome.reference += want.o[n] * want.o[n];
          if (none && got != 0) outcome.rows_without_keys_are_empty = false;
        }
        if (none) {
          if (got_lse != want.lse) outcome.rows_without_keys_are_empty = false;
        } else if (!(std::abs(got_lse - want.lse) <= outcome.lse_error)) {
          outcome.lse_error = std::abs(got_lse - want.lse);  // a NaN lands here too
        }
      }
    }
  }
  return outcome;
}

/// Runs a case on this rank and tells where the result leaves its bounds; `sum` adds a number over
/// all ranks (collective). Nothing where all is well.
template <class T, class Transport, class Sum>
std::string trouble_with(const Case& c, Transport& transport, bool checked, const Sum& sum) {
  const Problem problem = c.problem();
  const Tensors<T> tensors(c.shape, 21);
  const Outcome mine =
      run_and_judge(problem, c.how(), transport, tensors, EngineOptions{.checked = checked});
  const double error = std::sqrt(sum(mine.error));
  const double reference = std::sqrt(sum(mine.reference));
  const bool narrow = sizeof(T) == 4;
  std::string trouble;
  if (!(error <= (narrow ? 1e-6 : 1e-14) * reference)) {
    trouble += " O is off by " + std::to_string(error / reference);
  }
  if (!(mine.lse_error <= (narrow ? 1e-6 : 1e-13))) {
    trouble += " LSE is off by " + std::to_string(mine.lse_error);
  }
  if (!mine.rows_without_keys_are_empty) trouble += " a row without keys is not empty";
  const Rehearsal rehearsal = rehearse(problem, make_plan(c.how(), problem));
  const Index planned =
      rehearsal.fault ? -1 : rehearsal.bytes_sent[static_cast<std::size_t>(transport.rank())];
  if (mine.times.bytes_sent != planned) {
    trouble += " sent " + std::to_string(mine.times.bytes_sent) + " bytes, planned " +
               std::to_string(planned);
  }
  return trouble.empty() ? trouble : c.text() + ":" + trouble;
}

}  // namespace dattn::testing
