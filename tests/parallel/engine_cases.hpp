#pragma once

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/reference.hpp"
#include "parallel/engine.hpp"
#include "parallel/passes.hpp"
#include "parallel/stats.hpp"
#include "parallel/strategies.hpp"
#include "tests/cases.hpp"
#include "tests/normal.hpp"
#include "tests/parallel/compensated.hpp"

namespace dattn::testing {

/// Q, K, V and dO of a whole problem; every rank makes the same.
template <class T>
struct Tensors {
  std::vector<T> q, k, v, d_o;

  Tensors(const Shape& s, unsigned seed) {
    std::mt19937 bits(seed);
    const NormalNumbers normal;
    const auto fill = [&](std::vector<T>& to, Index count) {
      to.resize(static_cast<std::size_t>(count));
      for (T& x : to) x = static_cast<T>(normal(bits));
    };
    fill(q, s.queries * s.query_heads * s.d_qk);
    fill(k, s.keys * s.key_heads * s.d_qk);
    fill(v, s.keys * s.value_heads * s.d_v);
    fill(d_o, s.queries * s.query_heads * s.d_v);
  }
  const std::vector<T>& of(Kind kind) const {
    return kind == Kind::Q ? q : kind == Kind::K ? k : kind == Kind::V ? v : d_o;
  }
};

/// Fills the input slots of `program` but that of Stats and those that `before` keeps, if given.
template <class T, class Transport>
void load(Engine<Transport>& engine, const Problem& problem, const Program& program,
          const Tensors<T>& tensors, const Program* before = nullptr) {
  const Shape& s = problem.shape();
  for (const SlotId slot : program.inputs) {
    const Block& block = program.slots[static_cast<std::size_t>(slot)].block;
    if (block.kind == Kind::Stats || (before != nullptr && kept_slot(*before, block))) continue;
    const Index row = heads_of(block.kind, s) * dim_of(block.kind, s);
    const bool query = of_queries(block.kind);
    T* to = reinterpret_cast<T*>(engine.input(slot).data());
    for (const Run& run : (query ? problem.queries() : problem.keys()).positions(block.rows)) {
      for (Index i = 0; i < run.count; ++i) {
        const Index from = run.at(i) - (query ? s.first_query() : 0);
        to = std::copy_n(tensors.of(block.kind).data() + from * row, row, to);
      }
    }
  }
}

/// What one rank found out about its own result.
struct Outcome {
  double error = 0;      ///< sum of squares against the reference
  double reference = 0;  ///< sum of squares of the reference
  double lse_error = 0;  ///< largest absolute
  Index dropped = 0;     ///< keys that are compensated for, over key heads
  bool rows_without_keys_are_empty = true;
  RunTimes times;
  std::vector<std::byte> bits;  ///< of O and LSE
  std::vector<double> o, lse;   ///< of the rows that the rank delivers
};

/// Runs this rank's part of `problem` over `transport`, twice, and judges it by the reference.
template <class T, class Transport>
Outcome run_and_judge(const Problem& problem, const Strategy& strategy, Transport& transport,
                      const Tensors<T>& tensors, EngineOptions options) {
  const Shape& s = problem.shape();
  options.score.scale = 1 / std::sqrt(static_cast<double>(s.d_qk));
  const Program program = strategy.program(problem, transport.rank());
  Engine<Transport> engine(problem, program, transport, options);
  load(engine, problem, program, tensors);
  const Block& delivers = program.result(Kind::O).block;
  const auto records = static_cast<std::size_t>(delivers.row_count() * s.query_heads);
  std::vector<SumOf<T>> o(records * static_cast<std::size_t>(s.d_v));
  std::vector<SumOf<T>> lse(records);
  Outcome outcome;
  for (int time = 0; time < 2; ++time) {  // the second run must not see the first
    outcome.times = engine.run();
    engine.result(std::span(o), std::span(lse));
    std::vector<std::byte> bits;
    for (const auto part : {std::as_bytes(std::span(o)), std::as_bytes(std::span(lse))}) {
      bits.insert(bits.end(), part.begin(), part.end());
    }
    if (time == 1 && bits != outcome.bits) outcome.lse_error = 1e9;  // not the same bits
    outcome.bits = std::move(bits);
    // Nor may it see what benches do in between.
    if (time == 0) {
      engine.run({.messages = false, .polling = false});
      engine.run({.kernels = false});
    }
  }
  outcome.o.assign(o.begin(), o.end());
  outcome.lse.assign(lse.begin(), lse.end());
  const View<const T> q{tensors.q.data(), s.queries, s.query_heads, s.d_qk};
  const View<const T> k{tensors.k.data(), s.keys, s.key_heads, s.d_qk};
  const View<const T> v{tensors.v.data(), s.keys, s.value_heads, s.d_v};
  const Expected<T> expected(problem, options.score, q, k, v);
  outcome.dropped = expected.dropped();
  std::size_t record = 0;
  for (const Run& run : problem.queries().positions(delivers.rows)) {
    for (Index i = 0; i < run.count; ++i) {
      for (Index h = 0; h < s.query_heads; ++h, ++record) {
        const ReferenceRow want = expected.row(h, run.at(i) - s.first_query());
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

/// What one rank found out about its own gradients.
struct GradientOutcome {
  double error[3] = {};      ///< sums of squares against the reference, of dQ, dK, dV
  double reference[3] = {};  ///< sums of squares of the reference over all ranks
  bool rows_without_pairs_are_empty = true;
  bool same_bits = true;
  RunTimes times;
  std::vector<std::byte> bits;  ///< of dQ, dK and dV
};

/// Whether any pair bears on this row of this head of dQ, dK or dV.
inline bool has_pair(const Problem& problem, Kind kind, Index head, Index position) {
  const Shape& s = problem.shape();
  const Range heads = query_heads_of(kind, {head, head + 1}, s);
  for (Index h = heads.begin; h < heads.end; ++h) {
    if (of_queries(kind)) {
      for (Index k = 0; k < s.keys; ++k) {
        if (problem.mask().allows(h, position, k)) return true;
      }
    } else {
      for (Index q = s.first_query(); q < s.keys; ++q) {
        if (problem.mask().allows(h, q, position)) return true;
      }
    }
  }
  return false;
}

/// Fills the slot of Stats, of the rows that forward delivered; dO is of the same here.
template <class T, class Transport>
void load_stats(Engine<Transport>& engine, const Problem& problem, const Program& program,
                const Tensors<T>& tensors, const Outcome& forward) {
  const Shape& s = problem.shape();
  const SlotId slot = program.input(Kind::Stats);
  const Block& own = program.slots[static_cast<std::size_t>(slot)].block;
  std::vector<T> d_o;
  for (const Run& run : problem.queries().positions(own.rows)) {
    for (Index i = 0; i < run.count; ++i) {
      const Index row = s.query_heads * s.d_v;
      const T* from = tensors.d_o.data() + (run.at(i) - s.first_query()) * row;
      d_o.insert(d_o.end(), from, from + row);
    }
  }
  using Sum = SumOf<T>;
  const std::vector<Sum> o(forward.o.begin(), forward.o.end());
  const std::vector<Sum> lse(forward.lse.begin(), forward.lse.end());
  const Index rows = own.row_count();
  fill_stats<T>({o.data(), rows, s.query_heads, s.d_v}, lse,
                {d_o.data(), rows, s.query_heads, s.d_v},
                {reinterpret_cast<Sum*>(engine.input(slot).data()), rows, s.query_heads, 2});
}

/// The gradients that the engine has found, one after the other.
template <class T, class Transport>
std::vector<std::byte> gradient_bits(const Engine<Transport>& engine, const Problem& problem,
                                     const Program& program) {
  std::vector<std::byte> bits;
  for (const Result& result : program.results) {
    const Kind kind = result.block.kind;
    std::vector<SumOf<T>> got(
        static_cast<std::size_t>(result.block.row_count() * heads_of(kind, problem.shape()) *
                                 dim_of(kind, problem.shape())));
    engine.gradient(kind, std::span(got));
    const auto more = std::as_bytes(std::span(got));
    bits.insert(bits.end(), more.begin(), more.end());
  }
  return bits;
}

/// Runs both passes of a problem that keeps, twice each; gives what the backward pass did and its
/// gradients' bits, judged by nothing but that the second run must not see the first.
template <class T, class Transport>
GradientOutcome run_keeping(const Problem& problem, const Strategy& strategy, Transport& transport,
                            const Tensors<T>& tensors, EngineOptions options,
                            const Outcome& forward) {
  options.score.scale = 1 / std::sqrt(static_cast<double>(problem.shape().d_qk));
  const Program first = strategy.program(problem, transport.rank());
  const Program second = strategy.backward(problem, transport.rank());
  Engine<Transport> before(problem, first, transport, options);
  load(before, problem, first, tensors);
  Engine<Transport> engine(problem, second, transport, options);
  load(engine, problem, second, tensors, &first);
  load_stats(engine, problem, second, tensors, forward);
  for (const SlotId slot : second.inputs) {
    const auto kept = kept_slot(first, second.slots[static_cast<std::size_t>(slot)].block);
    if (kept) engine.bind(slot, before.kept(*kept));
  }
  GradientOutcome outcome;
  for (int time = 0; time < 2; ++time) {
    before.run();
    outcome.times = engine.run();
    auto bits = gradient_bits<T>(engine, problem, second);
    outcome.same_bits = time == 0 || bits == outcome.bits;
    outcome.bits = std::move(bits);
  }
  return outcome;
}

/// Runs this rank's part of the backward pass, from what its forward pass left, twice, and judges
/// it by the reference.
template <class T, class Transport>
GradientOutcome run_and_judge_backward(const Problem& problem, const Strategy& strategy,
                                       Transport& transport, const Tensors<T>& tensors,
                                       EngineOptions options, const Outcome& forward) {
  const Shape& s = problem.shape();
  options.score.scale = 1 / std::sqrt(static_cast<double>(s.d_qk));
  const Program program = strategy.backward(problem, transport.rank());
  Engine<Transport> engine(problem, program, transport, options);
  load(engine, problem, program, tensors);
  load_stats(engine, problem, program, tensors, forward);
  using Sum = SumOf<T>;
  const ReferenceGradients want = reference_gradients<T>(
      s, problem.mask(), options.score, {tensors.q.data(), s.queries, s.query_heads, s.d_qk},
      {tensors.k.data(), s.keys, s.key_heads, s.d_qk},
      {tensors.v.data(), s.keys, s.value_heads, s.d_v},
      {tensors.d_o.data(), s.queries, s.query_heads, s.d_v});
  GradientOutcome outcome;
  for (int time = 0; time < 2; ++time) {  // the second run must not see the first
    outcome.times = engine.run();
    auto bits = gradient_bits<T>(engine, problem, program);
    if (time == 1) {
      outcome.same_bits = bits == outcome.bits;
      break;
    }
    outcome.bits = std::move(bits);
    for (std::size_t n = 0; n < 3; ++n) {
      const Result& result = program.results[n];
      const Kind kind = result.block.kind;
      const Index heads = heads_of(kind, s);
      const Index dim = dim_of(kind, s);
      std::vector<Sum> got(static_cast<std::size_t>(result.block.row_count() * heads * dim));
      engine.gradient(kind, std::span(got));
      const std::vector<double>& all = n == 0 ? want.dq : n == 1 ? want.dk : want.dv;
      for (const double x : all) outcome.reference[n] += x * x;
      std::size_t at = 0;
      const bool query = of_queries(kind);
      for (const Run& run :
           (query ? problem.queries() : problem.keys()).positions(result.block.rows)) {
        for (Index i = 0; i < run.count; ++i) {
          const Index row = run.at(i) - (query ? s.first_query() : 0);
          for (Index h = 0; h < heads; ++h) {
            const bool some = has_pair(problem, kind, h, run.at(i));
            for (Index x = 0; x < dim; ++x, ++at) {
              const auto number = static_cast<double>(got[at]);
              const double off =
                  number - all[static_cast<std::size_t>((row * heads + h) * dim + x)];
              outcome.error[n] += off * off;
              if (!some && number != 0) outcome.rows_without_pairs_are_empty = false;
            }
          }
        }
      }
    }
  }
  return outcome;
}

/// What kernels/README.md promises of each type. On the wire bfloat16 is no less precise than
/// computing in it is, and m and l are exact.
struct Bounds {
  double o, lse, gradient;
};
inline Bounds bounds_of(const Case& c) {
  const Bounds rounded{4e-3, 4e-3, 8e-3};
  if (c.type == Type::bf16) return rounded;
  if (c.wire == Wire::bf16) return {rounded.o, 1e-6, rounded.gradient};
  return c.type == Type::f4 ? Bounds{1e-6, 1e-6, 3e-6} : Bounds{1e-14, 1e-13, 1e-13};
}

/// Where gradients leave their bounds.
template <class T, class Transport, class Sum>
std::string gradient_trouble(const Case& c, const Problem& problem, Transport& transport,
                             const Tensors<T>& tensors, bool checked, const Outcome& forward,
                             const Sum& sum) {
  const GradientOutcome mine =
      run_and_judge_backward(problem, c.how(), transport, tensors,
                             EngineOptions{.poll_every = 0, .checked = checked}, forward);
  std::string trouble;
  for (std::size_t n = 0; n < 3; ++n) {
    const double error = std::sqrt(sum(mine.error[n]));
    // Gradients of a row that sees one key cancel to 0. Where all rows do, a norm is nothing to be
    // relative to, and the bound is that of as many rows of length 1.
    constexpr double kCancelled = 1e-9;
    const double norm = std::sqrt(mine.reference[n]);
    const double rows = std::sqrt(static_cast<double>(c.shape.queries * c.shape.query_heads));
    const double reference = std::max(1.0, norm < kCancelled ? rows : norm);
    if (!(error <= bounds_of(c).gradient * reference)) {
      trouble += " " + std::string(name_of(result_kinds(Pass::backward)[n])) + " is off by " +
                 std::to_string(1e6 * error / reference) + "e-6";
    }
  }
  if (!mine.rows_without_pairs_are_empty) trouble += " a row without pairs has a gradient";
  if (!mine.same_bits) trouble += " a second run gave other gradients";
  const Rehearsal rehearsal = rehearse(problem, make_plan(c.how(), problem, Pass::backward));
  const Index planned =
      rehearsal.fault ? -1 : rehearsal.bytes_sent[static_cast<std::size_t>(transport.rank())];
  if (mine.times.bytes_sent != planned) {
    trouble += " backward sent " + std::to_string(mine.times.bytes_sent) + " bytes, planned " +
               std::to_string(planned);
  }
  const Problem keeping = problem.keeping(true);
  if (make_program(c.how(), keeping, 0, Pass::forward).kept.empty()) return trouble;
  const GradientOutcome kept =
      run_keeping(keeping, c.how(), transport, tensors, EngineOptions{.checked = checked}, forward);
  if (kept.bits != mine.bits) trouble += " from what was kept come other gradients";
  if (!kept.same_bits) trouble += " a second run from what was kept gave other gradients";
  const Rehearsal proof = rehearse(keeping, make_plan(c.how(), keeping, Pass::backward));
  const Index fewer =
      proof.fault ? -1 : proof.bytes_sent[static_cast<std::size_t>(transport.rank())];
  if (kept.times.bytes_sent != fewer) {
    trouble += " from what was kept backward sent " + std::to_string(kept.times.bytes_sent) +
               " bytes, planned " + std::to_string(fewer);
  }
  return trouble;
}

/// trouble_with() for elements of type T.
template <class T, class Transport, class Sum>
std::string trouble_in(const Case& c, Transport& transport, bool checked, const Sum& sum) {
  const Problem problem = c.problem();
  const Tensors<T> tensors(c.shape, 21);
  const Outcome mine = run_and_judge(problem, c.how(), transport, tensors,
                                     EngineOptions{.poll_every = 0, .checked = checked});
  const double error = std::sqrt(sum(mine.error));
  const double reference = std::sqrt(sum(mine.reference));
  std::string trouble;
  if (!(error <= bounds_of(c).o * reference)) {
    trouble += " O is off by " + std::to_string(error / reference);
  }
  if (!(mine.lse_error <= bounds_of(c).lse)) {
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
  if (c.compensate == Compensate::off) {
    trouble += gradient_trouble(c, problem, transport, tensors, checked, mine, sum);
  } else if ((mine.dropped > 0) != !problem.dropped().empty()) {
    trouble += " drops " + std::to_string(mine.dropped) + " keys";
  }
  return trouble.empty() ? trouble : c.text() + " " + name_of(c.type) + ":" + trouble;
}

/// Runs a case on this rank and tells where the result leaves its bounds; `sum` adds a number over
/// all ranks (collective). Nothing where all is well.
template <class Transport, class Sum>
std::string trouble_with(const Case& c, Transport& transport, bool checked, const Sum& sum) {
  if (c.type == Type::bf16) return trouble_in<BFloat16>(c, transport, checked, sum);
  if (c.type == Type::f4) return trouble_in<float>(c, transport, checked, sum);
  return trouble_in<double>(c, transport, checked, sum);
}

}  // namespace dattn::testing
