#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kernels/dot.hpp"
#include "launcher/verify.hpp"
#include "launcher/verify_rows.hpp"

namespace dattn {

using namespace checking;

namespace {

/// What a query row and head has of the forward pass.
struct Known {
  double lse = 0;
  double delta = 0;
  double single = 0;  ///< 1 where it sees a single key, else 0
};

/// A gradient of one row and head, and the sizes of what cancels in it.
struct Slope {
  std::vector<double> sum, cancels;

  explicit Slope(Index dim) : sum(static_cast<std::size_t>(dim), 0.0), cancels(sum) {}

  /// Adds weight * row; `size` is what the weight would be without cancellation.
  template <class T>
  void add(double weight, double size, const T* row) {
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += weight * static_cast<double>(row[i]);
    for (std::size_t i = 0; size != 0 && i < sum.size(); ++i) {
      cancels[i] += size * std::abs(static_cast<double>(row[i]));
    }
  }
};

/// |error|^2, |ref|^2 and the squares of what cancels, over the compared rows; and if all was
/// finite.
struct Tally {
  std::array<double, 3> squares{};
  bool finite = true;

  template <class T>
  void compare(const Slope& want, const T* found) {
    for (std::size_t i = 0; i < want.sum.size(); ++i) {
      const auto got = static_cast<double>(found[i]);
      const double ref = want.sum[i];
      if (std::isfinite(ref) != std::isfinite(got)) finite = false;
      if (!std::isfinite(ref) || !std::isfinite(got)) continue;
      squares[0] += (got - ref) * (got - ref);
      squares[1] += ref * ref;
      squares[2] += want.cancels[i] * want.cancels[i];
    }
  }
};

/// The pair's weight in dV, and in dQ and dK.
struct PairSlope {
  double p = 0;
  double ds = 0;
  double size = 0;  ///< of what cancels in ds
};
template <class T>
PairSlope slope_of(const Known& known, const Score& how, const ScoreValue& score, const T* d_o,
                   const T* v, Index d_v) {
  const double dp = dot(d_o, v, d_v);
  if (how.sigmoid) {
    const double p = std::exp(log_weight_of(how, score.value));
    const double rest = std::exp(log_weight_of(how, -score.value));  // 1 - p
    return {p, how.scale * score.slope * p * rest * dp, 0};
  }
  const double p = std::exp(score.value - known.lse);
  const double by_product = how.scale * score.slope * p;
  return {p, by_product * (dp - known.delta),
          known.single * std::abs(by_product) * (std::abs(dp) + std::abs(known.delta))};
}

/// Keys of `spans` that count for the query: neither a log-weight nor a bias of -inf leaves them
/// out.
Index counted(const std::vector<Range>& spans, const Scoring& scoring, const Shape& shape,
              Index head, Index query) {
  const bool all = scoring.key_weights.empty() && scoring.score.bias.empty();
  Index keys = 0;
  for (const Range span : spans) {
    if (all) {
      keys += span.size();
      continue;
    }
    for (Index key = span.begin; key < span.end; ++key) {
      const double weight = log_weight(scoring, shape, key, shape.key_head(head));
      keys += std::isfinite(score_of(scoring.score, head, query, key, 0, weight).value) ? 1 : 0;
    }
  }
  return keys;
}

/// Known of every row at `positions`, by (row, head): of the rows `sampled` from their sums.
template <class T>
std::vector<Known> known_of(const Problem& problem, const Source& source, const Runs& positions,
                            const std::vector<Index>& sampled, const std::vector<RowSum>& sums,
                            const Scoring& scoring, const Training<T>& found) {
  const Shape& shape = problem.shape();
  const auto heads = static_cast<std::size_t>(shape.query_heads);
  const auto d_v = static_cast<std::size_t>(shape.d_v);
  std::vector<Known> all(static_cast<std::size_t>(size(positions)) * heads);
  std::vector<T> d_o(heads * d_v);
  std::vector<Range> spans;
  std::size_t next = 0;  // of `sampled`
  for (Index row = 0; row < size(positions); ++row) {
    const Runs one = part(positions, {row, row + 1});
    source.read(Kind::dO, one, d_o.data());
    const bool exact = next < sampled.size() && sampled[next] == row;
    for (std::size_t h = 0; h < heads; ++h) {
      const std::size_t record = static_cast<std::size_t>(row) * heads + h;
      Known& known = all[record];
      const T* g = d_o.data() + h * d_v;
      if (exact) {
        const RowSum& sum = sums[next * heads + h];
        known.lse = sum.top + std::log(sum.weight);
        known.delta = dot(g, sum.values.data(), shape.d_v) / divisor_of(scoring.score, sum);
      } else {
        known.lse = static_cast<double>(found.lse[record]);
        known.delta = dot(g, found.o.data() + record * d_v, shape.d_v);
      }
      spans.clear();
      problem.mask().spans(static_cast<Index>(h), one.front().first, {0, shape.keys}, spans);
      const Index keys = counted(spans, scoring, shape, static_cast<Index>(h), one.front().first);
      known.single = keys == 1 && scoring.sinks.empty() ? 1 : 0;
      // Nothing counts where a mask, log-weights or a bias leave no key.
      if (keys == 0 || known.lse == -std::numeric_limits<double>::infinity()) known = {};
    }
    if (exact) ++next;
  }
  return all;
}

/// dQ of the rows `rows` of those at `positions`, by (row, head).
template <class T>
std::vector<Slope> dq_of(const Problem& problem, const Source& source, const Scoring& scoring,
                         const Runs& positions, const std::vector<Index>& rows,
                         const std::vector<Known>& known) {
  const Score& score = scoring.score;
  const Shape& shape = problem.shape();
  const auto heads = static_cast<std::size_t>(shape.query_heads);
  std::vector<Slope> out(rows.size() * heads, Slope(shape.d_qk));
  if (rows.empty()) return out;
  const std::vector<T> q = rows_of<T>(source, Kind::Q, positions, rows);
  const std::vector<T> d_o = rows_of<T>(source, Kind::dO, positions, rows);
  const std::vector<Index> at = positions_of(positions, rows);
  each_piece_of_keys<T>(source, [&](const Run& piece, View<const T> k, View<const T> v) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (std::size_t h = 0; h < heads; ++h) {
        const auto head = static_cast<Index>(h);
        const std::size_t record = i * heads + h;
        const T* q_row = q.data() + record * static_cast<std::size_t>(shape.d_qk);
        const T* g = d_o.data() + record * static_cast<std::size_t>(shape.d_v);
        for (Index j = 0; j < piece.count; ++j) {
          if (!problem.mask().allows(head, at[i], piece.at(j))) continue;
          const Index key_head = shape.key_head(head);
          const T* k_row = k.at(j, key_head);
          const PairSlope pair =
              slope_of(known[static_cast<std::size_t>(rows[i]) * heads + h], score,
                       score_of(score, head, at[i], piece.at(j), dot(q_row, k_row, shape.d_qk),
                                log_weight(scoring, shape, piece.at(j), key_head)),
                       g, v.at(j, shape.value_head(head)), shape.d_v);
          out[record].add(pair.ds, pair.size, k_row);
        }
      }
    }
  });
  return out;
}

/// dK and dV of the rows `rows` of those at `positions`, by (row, head). Collective: every rank
/// tells the others what it knows of its queries, `known` of the rows `own`, a piece at a time.
template <class T>
std::pair<std::vector<Slope>, std::vector<Slope>> dkv_of(
    comm::Communicator& world, const Problem& problem, const Source& source, const Scoring& scoring,
    const Runs& positions, const std::vector<Index>& rows, const Ranges& own,
    const std::vector<Known>& known) {
  const Score& score = scoring.score;
  const Shape& shape = problem.shape();
  const auto heads = static_cast<std::size_t>(shape.query_heads);
  std::vector<Slope> dk(rows.size() * static_cast<std::size_t>(shape.key_heads), Slope(shape.d_qk));
  std::vector<Slope> dv(rows.size() * static_cast<std::size_t>(shape.value_heads),
                        Slope(shape.d_v));
  const std::vector<T> k = rows_of<T>(source, Kind::K, positions, rows);
  const std::vector<T> v = rows_of<T>(source, Kind::V, positions, rows);
  const std::vector<Index> at = positions_of(positions, rows);
  const View<const T> k_view{k.data(), std::ssize(rows), shape.key_heads, shape.d_qk};
  const View<const T> v_view{v.data(), std::ssize(rows), shape.value_heads, shape.d_v};
  std::vector<T> q(static_cast<std::size_t>(kPiece * shape.query_heads * shape.d_qk));
  std::vector<T> d_o(static_cast<std::size_t>(kPiece * shape.query_heads * shape.d_v));
  for (Index from = 0; from < shape.queries; from += kPiece) {
    const Range piece{from, std::min(from + kPiece, shape.queries)};
    std::vector<double> told(static_cast<std::size_t>(piece.size()) * heads * 3, 0.0);
    for (Index row = piece.begin; row < piece.end; ++row) {
      const auto place = place_of(own, row);
      for (std::size_t h = 0; place && h < heads; ++h) {
        const Known& one = known[static_cast<std::size_t>(*place) * heads + h];
        double* to = told.data() + (static_cast<std::size_t>(row - from) * heads + h) * 3;
        to[0] = one.lse;
        to[1] = one.delta;
        to[2] = one.single;
      }
    }
    world.all_reduce_sum(std::span(told));
    if (rows.empty()) continue;
    const Runs queries = problem.queries().positions({piece});
    source.read(Kind::Q, queries, q.data());
    source.read(Kind::dO, queries, d_o.data());
    Index row = 0;
    for (const Run& run : queries) {
      for (Index i = 0; i < run.count; ++i, ++row) {
        for (std::size_t h = 0; h < heads; ++h) {
          const auto head = static_cast<Index>(h);
          const std::size_t record = static_cast<std::size_t>(row) * heads + h;
          const Known one{told[record * 3], told[record * 3 + 1], told[record * 3 + 2]};
          const T* q_row = q.data() + record * static_cast<std::size_t>(shape.d_qk);
          const T* g = d_o.data() + record * static_cast<std::size_t>(shape.d_v);
          const Index kh = shape.key_head(head);
          const Index vh = shape.value_head(head);
          for (Index n = 0; n < std::ssize(rows); ++n) {
            const Index key = at[static_cast<std::size_t>(n)];
            if (!problem.mask().allows(head, run.at(i), key)) continue;
            const PairSlope pair = slope_of(
                one, score,
                score_of(score, head, run.at(i), key, dot(q_row, k_view.at(n, kh), shape.d_qk),
                         log_weight(scoring, shape, key, kh)),
                g, v_view.at(n, vh), shape.d_v);
            dk[static_cast<std::size_t>(n * shape.key_heads + kh)].add(pair.ds, pair.size, q_row);
            dv[static_cast<std::size_t>(n * shape.value_heads + vh)].add(pair.p, 0, g);
          }
        }
      }
    }
  }
  return {std::move(dk), std::move(dv)};
}

}  // namespace

template <class T>
GradientVerdict verify_gradients(comm::Communicator& world, const Problem& problem,
                                 const Block& queries, const Block& keys, const Source& source,
                                 const Scoring& scoring, const Training<T>& found) {
  const Shape& shape = problem.shape();
  const Runs query_positions = problem.queries().positions(queries.rows);
  const Runs key_positions = problem.keys().positions(keys.rows);
  const double pair =
      2.0 * static_cast<double>(shape.query_heads) * static_cast<double>(shape.d_qk + shape.d_v);
  const std::vector<Index> query_rows =
      sample(size(query_positions), pair * static_cast<double>(shape.keys));
  const std::vector<Index> key_rows =
      sample(size(key_positions), pair * static_cast<double>(shape.queries));
  const std::vector<RowSum> sums =
      sums_of<T>(problem, source, scoring, query_positions, query_rows);
  const std::vector<Known> known =
      known_of(problem, source, query_positions, query_rows, sums, scoring, found);
  const std::vector<Slope> dq =
      dq_of<T>(problem, source, scoring, query_positions, query_rows, known);
  const auto [dk, dv] =
      dkv_of<T>(world, problem, source, scoring, key_positions, key_rows, queries.rows, known);

  std::array<Tally, 3> tallies;
  const auto compare = [](Tally& tally, const std::vector<Slope>& want,
                          const std::vector<Index>& rows, std::span<const T> got, Index heads,
                          Index dim) {
    for (std::size_t i = 0; i < want.size(); ++i) {
      const auto n = static_cast<Index>(i);
      const Index record = rows[static_cast<std::size_t>(n / heads)] * heads + n % heads;
      tally.compare(want[i], got.data() + record * dim);
    }
  };
  compare(tallies[0], dq, query_rows, found.dq, shape.query_heads, shape.d_qk);
  compare(tallies[1], dk, key_rows, found.dk, shape.key_heads, shape.d_qk);
  compare(tallies[2], dv, key_rows, found.dv, shape.value_heads, shape.d_v);

  std::array<double, 12> totals{};  // three squares a gradient, not finite, rows
  for (std::size_t i = 0; i < tallies.size(); ++i) {
    std::copy(tallies[i].squares.begin(), tallies[i].squares.end(),
              totals.begin() + 3 * static_cast<std::ptrdiff_t>(i));
    if (!tallies[i].finite) totals[9] = 1;
  }
  totals[10] = static_cast<double>(query_rows.size());
  totals[11] = static_cast<double>(key_rows.size());
  world.all_reduce_sum(totals);
  const auto error = [&](std::size_t i) {
    const double right = totals[3 * i + 1] + totals[3 * i + 2];
    return totals[3 * i] == 0 ? 0.0 : std::sqrt(totals[3 * i] / std::max(right, 1e-300));
  };
  GradientVerdict verdict;
  verdict.query_rows = static_cast<Index>(totals[10]);
  verdict.key_rows = static_cast<Index>(totals[11]);
  verdict.dq_error = error(0);
  verdict.dk_error = error(1);
  verdict.dv_error = error(2);
  verdict.finite = totals[9] == 0;
  const Type precision = precision_of(problem);
  verdict.epsilon = epsilon_of(precision);
  verdict.residual =
      std::max({verdict.dq_error, verdict.dk_error, verdict.dv_error}) / verdict.epsilon;
  // float32: 25 * 2^-23 = 2.98e-6, below the 3e-6 that kernels/README.md promises.
  verdict.threshold = precision == Type::bf16 ? 1 : precision == Type::f4 ? 25 : 400;
  return verdict;
}

Index check_bytes(const Problem& problem, const Program& forward, bool gradients) {
  const Shape& s = problem.shape();
  const Index number = sum_bytes_of(problem.type());
  constexpr Index kVector = sizeof(std::vector<double>) + 16;  // and what the allocator adds
  const auto sum = [](Index dim) { return 2 * kVector + 8 * dim; };
  const auto sampled = [](Index count, double work) {
    return std::min(count, std::max<Index>(4, static_cast<Index>(kBudget / work)));
  };
  const auto work = [&](Index others) {
    return static_cast<double>(others * s.query_heads) * static_cast<double>(s.d_qk + s.d_v);
  };
  const Index own = forward.result(Kind::O).block.row_count();
  const Index rows = sampled(own, work(s.keys));
  const Index of_keys = s.key_heads * s.d_qk + s.value_heads * s.d_v;
  const Index bytes =
      rows * s.query_heads * (sum(s.d_v) + number * s.d_qk) + kPiece * of_keys * number;
  if (!gradients) return bytes;
  const Index key_rows =
      sampled(forward.slots[static_cast<std::size_t>(forward.input(Kind::K))].block.row_count(),
              work(s.queries));
  const Index of_queries = s.query_heads * (s.d_qk + s.d_v);
  return bytes + own * s.query_heads * static_cast<Index>(sizeof(Known)) +
         rows * (s.query_heads * 2 * sum(s.d_qk) + of_queries * number) +
         key_rows *
             (s.key_heads * 2 * sum(s.d_qk) + s.value_heads * 2 * sum(s.d_v) + of_keys * number) +
         kPiece * (of_queries * number + 2 * s.query_heads * static_cast<Index>(sizeof(Known)));
}

template GradientVerdict verify_gradients(comm::Communicator&, const Problem&, const Block&,
                                          const Block&, const Source&, const Scoring&,
                                          const Training<float>&);
template GradientVerdict verify_gradients(comm::Communicator&, const Problem&, const Block&,
                                          const Block&, const Source&, const Scoring&,
                                          const Training<double>&);

}  // namespace dattn
