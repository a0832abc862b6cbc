#include "parallel/placement.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "parallel/head_cost.hpp"
#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"

namespace dattn {
namespace {

/// Key heads `full` see everything before them, the others a few keys.
std::string duo(const Shape& shape, const std::vector<Index>& full,
                const char* few = "stream:sink=4,recent=16") {
  std::string words;
  const Index group = shape.query_heads / shape.key_heads;
  for (Index k = 0; k < shape.key_heads; ++k) {
    const bool is_full = std::find(full.begin(), full.end(), k) != full.end();
    words += (k > 0 ? ";" : "") + std::string(is_full ? "causal" : few) + "@" +
             std::to_string(k * group) + "-" + std::to_string((k + 1) * group - 1);
  }
  return words;
}

Placement place(const Shape& shape, const std::string& mask, int members) {
  return place_heads(shape, *parse_mask(mask, shape), members);
}

void expect_each_head_once(const Placement& placed, const Shape& shape) {
  std::vector<Range> all;
  Index count = 0;
  for (const Ranges& heads : placed.heads) {
    all.insert(all.end(), heads.begin(), heads.end());
    count += size(heads);
  }
  EXPECT_EQ(union_of(std::move(all)), (Ranges{{0, shape.query_heads}}));
  EXPECT_EQ(count, shape.query_heads);
}

TEST(Placement, IsEvenPartsWhereHeadsCostTheSame) {
  for (const char* mask : {"full", "causal", "window:3,1"}) {
    for (int members = 1; members <= 9; ++members) {
      const Shape shape{64, 64, 8, 4, 2, 4, 4};
      const Placement placed = place(shape, mask, members);
      EXPECT_TRUE(placed.even) << mask << ", " << members;
      expect_each_head_once(placed, shape);
    }
  }
}

TEST(Placement, EvensOutAQuarterOfFullHeads) {
  // 8 of 32 heads are full, as DuoAttention keeps them, wherever they lie; 8 ranks.
  for (const Index key_heads : {Index{32}, Index{8}}) {
    const Shape shape{4096, 4096, 32, key_heads, key_heads, 4, 4};
    for (const Index first : {Index{0}, key_heads / 2, key_heads - key_heads / 4}) {
      std::vector<Index> full(static_cast<std::size_t>(key_heads / 4));
      std::iota(full.begin(), full.end(), first);
      const std::string mask = duo(shape, full);
      const Placement placed = place(shape, mask, 8);
      EXPECT_FALSE(placed.even);
      EXPECT_GT(placed.most_even, 3);
      EXPECT_LE(placed.most, 1.05);
      expect_each_head_once(placed, shape);
      // And so do the plans.
      for (const char* strategy : {"ulysses", "usp"}) {
        const Strategy& how = *find_strategy(strategy);
        const Problem problem(shape, parse_mask(mask, shape), how.mesh(8, shape), "zigzag");
        for (const Pass pass : {Pass::forward, Pass::backward}) {
          const Rehearsal found = rehearse(problem, make_plan(how, problem, pass));
          ASSERT_FALSE(found.fault) << found.fault->text();
          const Index total = std::accumulate(found.pairs.begin(), found.pairs.end(), Index{0});
          const Index most = *std::max_element(found.pairs.begin(), found.pairs.end());
          EXPECT_LE(static_cast<double>(most * 8), 1.05 * static_cast<double>(total))
              << strategy << ", " << mask;
        }
      }
    }
  }
}

TEST(Placement, KeepsGroupsTogetherWhereThatIsNearEnough) {
  // 8 of 16 groups of two heads are full: each of 4 members gets 2 of these and 2 of the others.
  const Shape shape{512, 512, 32, 16, 16, 4, 4};
  const Placement placed = place(shape, duo(shape, {0, 1, 2, 3, 4, 5, 6, 7}), 4);
  EXPECT_FALSE(placed.even);
  for (const Ranges& heads : placed.heads) {
    EXPECT_EQ(size(heads), 8);
    for (const Range r : heads) EXPECT_EQ(r.begin % 2 + r.end % 2, 0);
  }
  EXPECT_EQ(placed.heads[1], (Ranges{{4, 8}, {20, 24}}));
}

TEST(Placement, IsNeverFarFromTheBestThereIs) {
  // Spans that grow from head to head; every assignment of 7 heads to 3 members is tried.
  const Shape shape{200, 200, 7, 7, 7, 4, 4};
  std::string words;
  for (int h = 0; h < 7; ++h) {
    words += (h > 0 ? ";" : "") + ("window:" + std::to_string(3 + h * h * 4)) + ",0@" +
             std::to_string(h);
  }
  const MaskPtr mask = parse_mask(words, shape);
  const std::vector<Index> costs = cost_by_head(shape, *mask);
  double best = 1e9;
  for (int way = 0; way < 3 * 3 * 3 * 3 * 3 * 3 * 3; ++way) {
    double load[3] = {};
    for (int h = 0, rest = way; h < 7; ++h, rest /= 3)
      load[rest % 3] += static_cast<double>(costs[static_cast<std::size_t>(h)]);
    best = std::min(best, std::max({load[0], load[1], load[2]}));
  }
  const double mean = std::accumulate(costs.begin(), costs.end(), 0.0) / 3;
  const Placement placed = place_heads(shape, *mask, 3);
  EXPECT_LE(placed.most, (4.0 / 3 - 1.0 / 9) * best / mean);  // Graham's bound
  EXPECT_GE(placed.most, best / mean - 1e-9);
  expect_each_head_once(placed, shape);
}

TEST(Placement, CountsRowsWhereTheySeeFewKeys) {
  // 131 thousand pairs of the causal head, 16 thousand of each window's: by pairs alone it would be
  // left to itself, and the windows, whose rows cost more than their keys, to the other member.
  const Shape shape{512, 512, 5, 5, 5, 4, 4};
  const Placement placed = place(shape, "causal@0;window:31,0@1-4", 2);
  EXPECT_EQ(size(placed.heads[0]), 2);
  EXPECT_EQ(size(placed.heads[1]), 3);
}

TEST(HeadCost, IsOfThePairsThatAreComputedAndOfRows) {
  for (const Lengths l : {Lengths{96, 96}, Lengths{37, 90}}) {
    const Shape shape{l.queries, l.keys, 1, 1, 1, 4, 4};
    for (const auto& [words, step] : {std::pair{"full", 1},
                                      {"causal", 1},
                                      {"window:5,3", 1},
                                      {"s2:block=8,local=1,stride=3", 1},
                                      {"dilated:9,3,4", 4}}) {
      const MaskPtr mask = parse_mask(words, shape);
      Index cost = 64 * l.queries;
      for (Index begin = 0; begin < l.queries; begin += 16 * step) {
        for (Index residue = 0; residue < step; ++residue) {
          Index rows = 0;
          std::vector<bool> seen(static_cast<std::size_t>(l.keys));
          for (Index i = 0; i < 16; ++i) {
            const Index row = begin + residue + i * step;
            if (row >= l.queries) break;
            ++rows;
            for (Index k = 0; k < l.keys; ++k) {
              if (mask->allows(0, shape.first_query() + row, k)) {
                seen[static_cast<std::size_t>(k)] = true;
              }
            }
          }
          cost += rows * std::count(seen.begin(), seen.end(), true);
        }
      }
      EXPECT_EQ(cost_by_head(shape, *mask).front(), cost) << words << ", " << l.queries;
    }
  }
  // A sample of many rows: each group of 16 computes 16 * 15 / 2 pairs behind its queries.
  constexpr Index kTokens = 1 << 16;
  const Shape shape{kTokens, kTokens, 1, 1, 1, 4, 4};
  EXPECT_EQ(cost_by_head(shape, *parse_mask("causal", shape)).front(),
            kTokens * (kTokens + 1) / 2 + kTokens / 16 * 120 + 64 * kTokens);
}

TEST(Placement, OfMoreMembersThanHeadsLeavesSomeIdle) {
  const Shape shape{64, 64, 3, 1, 3, 4, 4};
  const Placement placed = place(shape, "causal@0;window:1,0@1-2", 5);
  EXPECT_EQ(placed.heads.size(), 5U);
  expect_each_head_once(placed, shape);
}

TEST(Placement, BytesAreThoseOfThePlacedHeads) {
  // Each member sends its rows of Q, K and V of others' heads, and the Partials of others' rows.
  const Shape shape{61, 61, 8, 4, 2, 5, 7};
  const std::string mask = duo(shape, {0, 1}, "window:2,0");
  for (const int ranks : {2, 3, 5}) {
    const Problem problem(shape, parse_mask(mask, shape), line(ranks), "contiguous");
    const Placement& placed = problem.placement(ranks);
    EXPECT_FALSE(placed.even);
    const Rehearsal found = rehearse(problem, make_plan(*find_strategy("ulysses"), problem));
    ASSERT_FALSE(found.fault) << found.fault->text();
    const auto read = [&](const Ranges& heads, Index count) {
      std::vector<bool> seen(static_cast<std::size_t>(count));
      for (const Range r : heads) {
        for (Index h = r.begin; h < r.end; ++h)
          seen[static_cast<std::size_t>(h * count / 8)] = true;
      }
      return std::count(seen.begin(), seen.end(), true);
    };
    for (int r = 0; r < ranks; ++r) {
      const Index rows = problem.queries().rows(r).size();
      const auto mine = static_cast<std::size_t>(r);
      Index numbers = (61 - rows) * size(placed.heads[mine]) * (7 + 2);
      for (std::size_t j = 0; j < placed.heads.size(); ++j) {
        if (j == mine) continue;
        const Ranges& heads = placed.heads[j];
        numbers += rows * (size(heads) * 5 + read(heads, 4) * 5 + read(heads, 2) * 7);
      }
      EXPECT_EQ(found.bytes_sent[mine], 4 * numbers) << ranks << " ranks, rank " << r;
    }
  }
}

// The heads that see much go around a ring, the others are exchanged for their queries' rows.
TEST(HeadSplit, BytesAreOfARingOfSomeHeadsAndAnExchangeOfTheOthers) {
  const Shape shape{60, 60, 16, 8, 8, 5, 5};
  const std::string mask = duo(shape, {1, 4}, "window:2,0");
  for (const int ranks : {2, 3}) {
    const Problem problem(shape, parse_mask(mask, shape), line(ranks), "zigzag");
    const HeadSplit& split = problem.head_split();
    EXPECT_EQ(split.shared, (Ranges{{2, 4}, {8, 10}}));
    const Index rows = 60 / ranks;
    Index whole = 0;  // numbers of Q, K, V and O of one's rows that leave, by rank
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      const Rehearsal found = rehearse(problem, make_plan(*find_strategy("mixed"), problem, pass));
      ASSERT_FALSE(found.fault) << found.fault->text();
      Index sum = 0;
      for (int r = 0; r < ranks; ++r) {
        const Index mine = size(split.whole[static_cast<std::size_t>(r)]);
        whole = 12 - mine;  // of 12 such heads, two of which share a key head
        const Index in = pass == Pass::forward ? whole * 5 + whole / 2 * 10
                                               : whole * (5 + 5 + 2) + whole / 2 * 10;
        const Index out = pass == Pass::forward ? mine * (5 + 2) : mine * 5 + mine / 2 * 10;
        const Index exchanged = rows * in + (60 - rows) * out;
        const Index hops = ranks - 1;
        const Index ring =
            rows * (pass == Pass::forward ? hops * 2 * 10 : hops * std::min(2 * 20, 4 * 17));
        EXPECT_EQ(found.bytes_sent[static_cast<std::size_t>(r)], 4 * (exchanged + ring))
            << ranks << " ranks, rank " << r << " " << name_of(pass);
        sum += mine;
      }
      EXPECT_EQ(sum, 12);
    }
  }
}

TEST(HeadSplit, LeavesNoHeadAloneWhereAllSeeAsMuch) {
  const Shape shape{64, 64, 8, 4, 4, 4, 4};
  for (const char* mask : {"causal", "window:3,0", "window:40,0@0-3;full@4-7"}) {
    const HeadSplit split = split_heads(shape, *parse_mask(mask, shape), 3);
    EXPECT_EQ(split.shared, (Ranges{{0, 8}})) << mask;
    for (const Ranges& heads : split.whole) EXPECT_TRUE(heads.empty());
  }
}

}  // namespace
}  // namespace dattn
