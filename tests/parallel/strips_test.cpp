// What rings move of heads that see little, against brute force over the mask and closed formulas.
#include "tests/parallel/volume.hpp"

namespace dattn {
namespace {

/// Whether every query head of `heads` sees fewer pairs than under a causal mask.
bool sees_less(const Problem& problem, Range heads) {
  const Shape& s = problem.shape();
  for (Index h = heads.begin; h < heads.end; ++h) {
    Index pairs = 0;
    Index causal = 0;
    for (Index q = s.first_query(); q < s.keys; ++q) {
      for (Index k = 0; k < s.keys; ++k) {
        pairs += problem.mask().allows(h, q, k) ? 1 : 0;
        causal += k <= q ? 1 : 0;
      }
    }
    if (pairs >= causal) return false;
  }
  return true;
}

/// rows[owner][reader]: the rows of the owner (of queries, or of keys) that the reader needs.
std::vector<std::vector<std::vector<bool>>> rows_needed(const Problem& problem, Range heads,
                                                        bool queries) {
  const auto ranks = static_cast<std::size_t>(problem.ranks());
  const auto& of = [&](bool q) -> const Partition& {
    return q ? problem.queries() : problem.keys();
  };
  std::vector<std::vector<std::vector<bool>>> rows(ranks);
  for (std::size_t owner = 0; owner < ranks; ++owner) {
    const Range own = of(queries).rows(static_cast<int>(owner));
    rows[owner].assign(ranks, std::vector<bool>(static_cast<std::size_t>(own.size())));
    for (Index row = own.begin; row < own.end; ++row) {
      const Index here = of(queries).positions({{row, row + 1}}).front().first;
      for (Index other = 0; other < of(!queries).tokens(); ++other) {
        const Index there = of(!queries).positions({{other, other + 1}}).front().first;
        for (Index h = heads.begin; h < heads.end; ++h) {
          if (!problem.mask().allows(h, queries ? here : there, queries ? there : here)) continue;
          rows[owner][static_cast<std::size_t>(of(!queries).owner(other))]
              [static_cast<std::size_t>(row - own.begin)] = true;
        }
      }
    }
  }
  return rows;
}

Index bytes_of_row(const Problem& problem, std::span<const Kind> kinds, Range heads) {
  Index bytes = 0;
  for (const Kind kind : kinds) {
    bytes += wire_bytes({kind, heads_touched(kind, heads, problem.shape()), {{0, 1}}}, problem);
  }
  return bytes;
}

/// What each rank sends of whichever side goes around, by a ring in each of `hosts` and rings
/// between them; one host is one ring of all ranks.
std::vector<Index> sent_by_rings(const Problem& problem, const Side& side, std::size_t hosts) {
  const auto ranks = static_cast<std::size_t>(problem.ranks());
  const std::size_t each = ranks / hosts;
  const bool queries = of_queries(side.inputs.front());
  std::vector<Index> sent(ranks, 0);
  for (const Range heads : problem.head_groups()) {
    const Index input = bytes_of_row(problem, side.inputs, heads);
    const Index sum = bytes_of_row(problem, side.sums, heads);
    const bool packed = sees_less(problem, heads);
    const auto rows = rows_needed(problem, heads, queries);
    for (std::size_t owner = 0; owner < ranks; ++owner) {
      for (std::size_t row = 0; row < rows[owner][0].size(); ++row) {
        // What is not packed is needed everywhere.
        const auto needed = [&](std::size_t host, std::size_t place) {
          return !packed || rows[owner][host % hosts * each + place % each][row];
        };
        const auto at = [&](std::size_t host, std::size_t place) -> Index& {
          return sent[host % hosts * each + place % each];
        };
        const std::size_t host = owner / each;
        const std::size_t place = owner % each;
        bool on_hosts_behind = false;
        for (std::size_t turn = hosts; turn-- > 0;) {
          bool on_host = false;  // needed by some rank of it
          for (std::size_t i = 0; i < each; ++i) on_host = on_host || needed(host + turn, i);
          on_hosts_behind = on_hosts_behind || on_host;
          if (turn > 0 && on_hosts_behind) at(host + turn - 1, place) += input;
          // Sums go round, or straight home, but for the owner's.
          if (turn > 0 && on_host) at(host + turn, place) += sum;
          bool further = false;
          for (std::size_t hop = each - 1; hop > 0; --hop) {
            further = further || needed(host + turn, place + hop);
            if (further) at(host + turn, place + hop - 1) += input;
            if (needed(host + turn, place + hop)) at(host + turn, place + hop) += sum;
          }
        }
      }
    }
  }
  return sent;
}

/// Holds both passes of a case to the mask. Gives whether it is one whose heads see little.
bool expect_needed(const Case& c, std::size_t hosts) {
  const Problem problem = c.problem();
  EXPECT_EQ(rehearsed(c).bytes_sent,
            sent_by_rings(problem, {input_kinds(Pass::forward).subspan(1), {}}, hosts))
      << c.text();
  const Plan plan = make_plan(c.how(), problem, Pass::backward);
  const bool queries = plan[0].note.starts_with("Q");
  EXPECT_EQ(rehearsed(c, Pass::backward).bytes_sent,
            sent_by_rings(problem, queries ? query_side(Pass::backward) : key_side(Pass::backward),
                          hosts))
      << c.text();
  return problem.is_sparse(0);
}

TEST(Strips, OfARingAreWhatRanksFurtherOnNeed) {
  std::size_t packed = 0;
  for (const int ranks : {1, 2, 3, 4, 7}) {
    for (const PartitionKind& partition : partition_kinds()) {
      for (const Heads heads : {Heads{4, 2, 2}, Heads{6, 3, 2}, Heads{2, 2, 2}}) {
        for (const Lengths l : {Lengths{23, 23}, Lengths{5, 23}, Lengths{23, 9}}) {
          const Shape shape = shape_of(l, heads, 5, 7);
          for (const std::string& mask : masks(shape)) {
            const Wire wire = kWires[packed % 2];
            const Case c{shape, mask, partition.name, "ring", line(ranks), Type::f4, wire};
            packed += expect_needed(c, 1) ? 1 : 0;
          }
        }
      }
    }
  }
  EXPECT_GT(packed, 500U);
}

TEST(Strips, OfDoubleRingsAreWhatHostsFurtherOnNeed) {
  std::size_t packed = 0;
  for (const auto& [outer, inner] : {std::pair{2, 2}, {3, 2}, {2, 3}, {4, 1}, {1, 4}}) {
    const Mesh mesh{{{"outer", outer}, {"inner", inner}}};
    for (const std::string_view partition : {"contiguous", "striped"}) {
      for (const Lengths l : {Lengths{23, 23}, Lengths{5, 23}}) {
        const Shape shape = shape_of(l, {6, 3, 2}, 5, 7);
        for (const std::string& mask : masks(shape)) {
          const Case c{shape, mask, partition, "double_ring", mesh, Type::f4, kWires[packed % 2]};
          packed += expect_needed(c, static_cast<std::size_t>(outer)) ? 1 : 0;
        }
      }
    }
  }
  EXPECT_GT(packed, 50U);
}

// A shard of 1 / stride of the blocks for each head, and `local` blocks at each border of ranks.
TEST(Strips, OfARingUnderS2AreAShardOfTheDenseRings) {
  constexpr Index kTokens = 4096;
  const Shape shape{kTokens, kTokens, 8, 8, 8, 4, 4};
  const auto sent = [&](const std::string& mask, int ranks, Pass pass) {
    const Rehearsal found = rehearsed({shape, mask, "contiguous", "ring", line(ranks)}, pass);
    return static_cast<double>(found.bytes_sent_total());
  };
  for (const int stride : {4, 8, 16}) {
    for (const int ranks : {2, 4, 7, 8}) {
      for (const Pass pass : {Pass::forward, Pass::backward}) {
        const std::string mask = "s2:block=16,local=4,step=1,stride=" + std::to_string(stride);
        const double local =
            (pass == Pass::forward ? 1 : 2) * (ranks - 1) * 4 * 16 * 8 * (4 + 4) * 4;
        EXPECT_LE(sent(mask, ranks, pass), 1.1 / stride * sent("causal", ranks, pass) + local)
            << mask << ", " << ranks << " ranks, " << name_of(pass);
      }
    }
  }
}

TEST(Strips, OfARingOnAWindowAreTheHalo) {
  for (const int ranks : {2, 4, 5}) {
    for (const Index left : {0, 1, 5, 16, 20, 40}) {
      if (left >= 16 * ranks) continue;  // causal
      const auto sent = [&](std::string_view strategy, Pass pass) {
        const std::string mask = "window:" + std::to_string(left) + ",0";
        const Case c{
            {16 * ranks, 16 * ranks, 4, 2, 2, 4, 4}, mask, "contiguous", strategy, line(ranks)};
        return rehearsed(c, pass).bytes_sent_total();
      };
      for (const Pass pass : {Pass::forward, Pass::backward}) {
        EXPECT_EQ(sent("ring", pass), sent("gather", pass)) << left << " of " << ranks;
      }
    }
  }
}

TEST(Strips, OfHeadsThatSeeMuchGoAroundWhole) {
  // Two of four heads are causal: half of the dense ring, and the halo of the others.
  const auto sent = [](const std::string& mask, Heads heads) {
    const Case c{shape_of({64, 64}, heads), mask, "contiguous", "ring", line(4)};
    return rehearsed(c).bytes_sent_total();
  };
  const Index dense = sent("causal", {2, 2, 2});
  const Index halo = sent("window:3,0", {2, 2, 2});
  EXPECT_EQ(halo, 3 * 3 * 2 * (4 + 4) * 4);
  EXPECT_EQ(sent("causal@0-1;window:3,0@2-3", {4, 4, 4}), dense + halo);
  EXPECT_EQ(sent("causal@0;window:3,0@1;causal@2;window:3,0@3", {4, 4, 4}), dense + halo);
}

TEST(Strips, OfRingsBetweenGroupsAndInsideHosts) {
  const auto sent = [](std::string_view strategy, std::string_view mask, Mesh mesh, Pass pass) {
    const Case c{shape_of({96, 96}, {4, 4, 4}), std::string(mask), "contiguous", strategy, mesh};
    return rehearsed(c, pass).bytes_sent_total();
  };
  const std::string_view window = "window:5,0";
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const Index ring = sent("ring", window, line(6), pass);
    EXPECT_EQ(sent("usp", window, {{{"ring", 6}, {"heads", 1}}}, pass), ring);
    EXPECT_EQ(sent("usp_inner_ring", window, {{{"heads", 1}, {"ring", 6}}}, pass), ring);
    EXPECT_EQ(sent("double_ring", window, {{{"outer", 1}, {"inner", 6}}}, pass), ring);
  }
  // Two groups of two ranks: K and V of all tokens cross the border of the groups once, or 5 rows.
  const Index row = 4 * (4 + 4) * 4;
  const Mesh square{{{"ring", 2}, {"heads", 2}}};
  EXPECT_EQ(sent("usp", "causal", square, Pass::forward) - 96 * row + 5 * row,
            sent("usp", window, square, Pass::forward));
  // Between hosts the 5 rows behind their border go to the same place of the other host, and from
  // there to who needs them; inside each the 5 rows behind that of its ranks.
  const Mesh hosts{{{"outer", 2}, {"inner", 2}}};
  EXPECT_EQ(sent("double_ring", window, hosts, Pass::forward), (2 * 5 + 2 * 5) * row);
}

}  // namespace
}  // namespace dattn
