#pragma once

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/reference.hpp"
#include "parallel/engine.hpp"
#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"

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
  options.scale = 1 / std::sqrt(static_cast<double>(s.d_qk));
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
        const ReferenceRow want = reference_row(s, problem.mask(), options.scale, q, k, v, h,
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

/// Words for a failing case.
inline std::string name_of_case(const Problem& p, const Strategy& strategy) {
  const Shape& s = p.shape();
  return std::string(strategy.name) + " " + p.partition() + " mesh " + p.mesh().text() + " " +
         p.mask().spec() + ", " + std::to_string(s.queries) + " queries, " +
         std::to_string(s.keys) + " keys, heads " + std::to_string(s.query_heads) + ":" +
         std::to_string(s.key_heads) + ":" + std::to_string(s.value_heads);
}

struct EngineCase {
  Shape shape;
  const char* mask;
};

/// Shapes with their masks: GQA, MQA, uneven heads, separate K and V heads, d_qk != d_v, lengths 1,
/// primes and what nothing divides, fewer and more queries than keys, rows without any key.
inline std::vector<EngineCase> engine_cases(int ranks) {
  const auto shape = [](Index queries, Index keys, Index heads, Index key_heads,
                        Index value_heads) {
    return Shape{queries, keys, heads, key_heads, value_heads, 8, 5};
  };
  return {
      {shape(101, 101, 6, 2, 2), "causal"},
      {shape(101, 101, 6, 2, 3), "full"},
      {shape(97, 97, 4, 4, 4), "window:11,3"},
      {shape(103, 103, 5, 1, 1), "documents:40,0,3,60+causal"},
      {shape(67, 67, 4, 2, 2), "prefix:13"},
      {shape(89, 89, 4, 2, 2), "window:9,0/sink:4"},
      {shape(71, 71, 6, 2, 2), "causal@0-1;window:4,2@2-3;sink:3@4-5"},
      {shape(1, 1, 3, 1, 1), "causal"},
      {shape(std::max(1, ranks - 1), std::max(1, ranks - 1), 2, 1, 1), "causal"},
      {shape(3, 131, 8, 2, 2), "causal"},
      {shape(53, 29, 4, 2, 2), "causal"},
      {shape(61, 61, 4, 2, 2), "window:0,0+sink:7"},
  };
}

}  // namespace dattn::testing
