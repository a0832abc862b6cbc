#pragma once

#include <gtest/gtest.h>

#include <numeric>

#include "parallel/rehearse.hpp"
#include "parallel/schedule.hpp"
#include "tests/cases.hpp"

namespace dattn {

inline Rehearsal rehearsed(const Case& c, Pass pass = Pass::forward, bool keeps = false) {
  const Problem problem = c.problem().keeping(keeps);
  Rehearsal found = rehearse(problem, make_plan(c.how(), problem, pass));
  EXPECT_FALSE(found.fault) << c.text() << ": " << found.fault->text();
  return found;
}

/// Bytes on the wire of all heads of `tokens` rows.
struct Sizes {
  Index q, kv, o, d_o, stats, dq, dkv;
};
inline Sizes sizes(const Case& c, Index tokens) {
  const Shape& s = c.shape;
  const Index heads = tokens * s.query_heads;
  const Index keys = tokens * (s.key_heads * s.d_qk + s.value_heads * s.d_v);
  const Index input = bytes_of(c.type);
  const Index exact = sum_bytes_of(c.type);
  const Index sum = c.wire == Wire::bf16 ? 2 : exact;
  return {heads * s.d_qk * input,
          keys * input,
          heads * (s.d_v * sum + 2 * exact),
          heads * s.d_v * input,
          heads * 2 * exact,
          heads * s.d_qk * sum,
          keys * sum};
}

/// Both ways of sums, for tests that take turns.
inline constexpr Wire kWires[] = {Wire::exact, Wire::bf16};

inline void expect_each(const Case& c, Index bytes, Pass pass = Pass::forward, bool keeps = false) {
  for (const Index sent : rehearsed(c, pass, keeps).bytes_sent) EXPECT_EQ(sent, bytes) << c.text();
}

/// usp on a mesh of ring x heads, 16 tokens a rank.
inline Case usp_case(int ring, int heads, Wire wire = Wire::exact) {
  const int tokens = 16 * ring * heads;
  return {{tokens, tokens, 8, 2, 2, 5, 7},      "causal", "zigzag", "usp",
          {{{"ring", ring}, {"heads", heads}}}, Type::f4, wire};
}

/// The query heads of member j of `ranks` under ulysses: floor(j H / P) to floor((j+1) H / P).
inline Range queries_of_member(const Heads& heads, int ranks, Index j) {
  return {j * heads.query / ranks, (j + 1) * heads.query / ranks};
}
/// How many of `count` key or value heads they read.
inline Index heads_read(const Heads& heads, int ranks, Index j, Index count) {
  std::vector<bool> seen(static_cast<std::size_t>(count), false);
  const Range queries = queries_of_member(heads, ranks, j);
  for (Index h = queries.begin; h < queries.end; ++h) {
    seen[static_cast<std::size_t>(h * count / heads.query)] = true;
  }
  return std::count(seen.begin(), seen.end(), true);
}

/// Keys that any query head served by one unit of K and V heads, of any query of `rank`, sees.
inline std::vector<bool> seen(const Problem& problem, int rank, Range heads) {
  const Shape& s = problem.shape();
  std::vector<bool> keys(static_cast<std::size_t>(s.keys), false);
  for (const Run& run : problem.queries().positions({problem.queries().rows(rank)})) {
    for (Index i = 0; i < run.count; ++i) {
      for (Index h = heads.begin; h < heads.end; ++h) {
        for (Index k = 0; k < s.keys; ++k) {
          if (problem.mask().allows(h, run.at(i), k)) keys[static_cast<std::size_t>(k)] = true;
        }
      }
    }
  }
  return keys;
}

/// Bytes of keys and values that ranks need of others: by the rank that owns them, and by the one
/// that needs them. Own rows x OTHER ranks that need them, unit of heads by unit.
struct Needed {
  std::vector<Index> by_owner, by_reader;
};
inline Needed needed_bytes(const Problem& problem) {
  const Shape& s = problem.shape();
  const Index unit = std::lcm(s.query_heads / s.key_heads, s.query_heads / s.value_heads);
  const Index row_bytes =
      (unit * s.key_heads / s.query_heads * s.d_qk + unit * s.value_heads / s.query_heads * s.d_v) *
      bytes_of(problem.type());
  const auto ranks = static_cast<std::size_t>(problem.ranks());
  Needed sent{std::vector<Index>(ranks, 0), std::vector<Index>(ranks, 0)};
  for (Index h = 0; h < s.query_heads; h += unit) {
    for (int reader = 0; reader < problem.ranks(); ++reader) {
      const auto keys = seen(problem, reader, {h, h + unit});
      for (Index row = 0; row < s.keys; ++row) {
        const Index key = problem.keys().positions({{row, row + 1}}).front().first;
        const int owner = problem.keys().owner(row);
        if (owner != reader && keys[static_cast<std::size_t>(key)]) {
          sent.by_owner[static_cast<std::size_t>(owner)] += row_bytes;
          sent.by_reader[static_cast<std::size_t>(reader)] += row_bytes;
        }
      }
    }
  }
  return sent;
}

/// The same of queries in a backward pass, by the ranks whose keys they see: Q, dO and Stats by the
/// rank that owns them, dQ by the one that needs them.
inline Needed needed_query_bytes(const Problem& problem) {
  const Shape& s = problem.shape();
  const Index unit = std::lcm(s.query_heads / s.key_heads, s.query_heads / s.value_heads);
  const Index type = bytes_of(problem.type());
  const Index sum = problem.type() == Type::f8 ? 8 : 4;
  const Index sent_sum = problem.wire() == Wire::bf16 ? 2 : sum;
  const auto ranks = static_cast<std::size_t>(problem.ranks());
  Needed sent{std::vector<Index>(ranks, 0), std::vector<Index>(ranks, 0)};
  for (Index h = 0; h < s.query_heads; h += unit) {
    for (int owner = 0; owner < problem.ranks(); ++owner) {
      for (const Run& run : problem.queries().positions({problem.queries().rows(owner)})) {
        for (Index i = 0; i < run.count; ++i) {
          std::vector<bool> readers(ranks, false);
          for (Index row = 0; row < s.keys; ++row) {
            const Index key = problem.keys().positions({{row, row + 1}}).front().first;
            for (Index head = h; head < h + unit; ++head) {
              if (!problem.mask().allows(head, run.at(i), key)) continue;
              readers[static_cast<std::size_t>(problem.keys().owner(row))] = true;
            }
          }
          for (int reader = 0; reader < problem.ranks(); ++reader) {
            if (reader == owner || !readers[static_cast<std::size_t>(reader)]) continue;
            sent.by_owner[static_cast<std::size_t>(owner)] +=
                unit * ((s.d_qk + s.d_v) * type + 2 * sum);
            sent.by_reader[static_cast<std::size_t>(reader)] += unit * s.d_qk * sent_sum;
          }
        }
      }
    }
  }
  return sent;
}

/// Blocks of K and V, and of queries and their Partials, that lightseq moves under a causal mask,
/// in eighths (backward those of the lighter side, and of the other): all pairs of ranks but one's
/// own, of which helpers have P^2 / 8, the pair at half way in halves.
struct Moved {
  Index kv, help;
};
inline Moved eighths(Index ranks) {
  const Index help = ranks % 2 == 0 ? ranks * ranks : ranks * ranks - 1;
  return {4 * ranks * (ranks - 1) - help, help};
}

/// What each rank must send for the pieces of the schedule, by brute force over `allows`.
inline std::vector<Index> needed_by_pieces(const Problem& problem, Pass pass) {
  const Shape& s = problem.shape();
  const Index size = bytes_of(problem.type());
  const Index sum = problem.wire() == Wire::bf16 ? 2 : size;
  const bool backward = pass == Pass::backward;
  std::vector<Index> sent(static_cast<std::size_t>(problem.ranks()), 0);
  for (const Piece& piece : problem.schedule(pass).pieces()) {
    if (piece.at != piece.queries) {
      const Index records = piece.rows.size() * piece.heads.size();
      const Index inputs = backward ? s.d_qk + s.d_v + 2 : s.d_qk;
      sent[static_cast<std::size_t>(piece.queries)] += records * inputs * size;
      sent[static_cast<std::size_t>(piece.at)] +=
          records * (backward ? s.d_qk * sum : s.d_v * sum + 2 * size);
    }
    if (piece.at == piece.keys) continue;
    const Index row = (s.key_heads_of(piece.heads).size() * s.d_qk +
                       s.value_heads_of(piece.heads).size() * s.d_v) *
                      size;
    const Runs queries = problem.queries().positions({piece.rows});
    for (const Run& key : problem.keys().positions({problem.keys().rows(piece.keys)})) {
      for (Index k = 0; k < key.count; ++k) {
        const auto sees = [&](const Run& run) {
          for (Index i = 0; i < run.count; ++i) {
            for (Index h = piece.heads.begin; h < piece.heads.end; ++h) {
              if (problem.mask().allows(h, run.at(i), key.at(k))) return true;
            }
          }
          return false;
        };
        if (std::any_of(queries.begin(), queries.end(), sees)) {
          sent[static_cast<std::size_t>(piece.keys)] += row;
          if (backward) sent[static_cast<std::size_t>(piece.at)] += row / size * sum;
        }
      }
    }
  }
  return sent;
}

/// The next rank around a ring of those that own anything; of a rank that does not, or is the only
/// one, itself.
inline int right_neighbour(const Problem& problem, int rank) {
  const auto owns = [&](int r) {
    return !problem.queries().rows(r).empty() || !problem.keys().rows(r).empty();
  };
  if (!owns(rank)) return rank;
  for (int places = 1; places < problem.ranks(); ++places) {
    const int next = (rank + places) % problem.ranks();
    if (owns(next)) return next;
  }
  return rank;
}

}  // namespace dattn
