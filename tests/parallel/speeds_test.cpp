// Ranks that are not equally fast: what they are dealt, what they compute, and what that takes.
#include "parallel/speeds.hpp"

#include <gmock/gmock.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "kernels/area.hpp"
#include "parallel/planner.hpp"
#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"

namespace dattn {
namespace {

constexpr int kRanks[] = {1, 2, 3, 4, 5, 7, 8};

Speeds speeds_at(int ranks, std::mt19937& bits, int least = 8) {
  std::uniform_int_distribution<int> step(least, 32);
  std::vector<double> by_rank;
  for (int r = 0; r < ranks; ++r) by_rank.push_back(step(bits));
  return Speeds(by_rank);
}

/// What the rank that takes longest takes, over what all would take if all were done at once.
double longest(const std::vector<Index>& work, const Speeds& speeds) {
  double most = 0;
  double speed = 0;
  for (std::size_t r = 0; r < work.size(); ++r) {
    const double own = speeds.of(static_cast<int>(r));
    most = std::max(most, static_cast<double>(work[r]) / own);
    speed += own;
  }
  return most * speed / static_cast<double>(std::accumulate(work.begin(), work.end(), Index{0}));
}

Problem problem_of(const Shape& shape, const std::string& mask, const Strategy& strategy,
                   std::string_view partition, const Speeds& speeds, int ranks) {
  return {
      shape, parse_mask(mask, shape), strategy.mesh(ranks, shape), partition, Type::f4, Wire::exact,
      speeds};
}

Rehearsal rehearsal_of(const Problem& problem, const Strategy& strategy, Pass pass,
                       const Machine& machine = {}) {
  Rehearsal found = rehearse(problem, make_plan(strategy, problem, pass), machine);
  EXPECT_FALSE(found.fault) << strategy.name << ", " << problem.speeds().text() << ": "
                            << found.fault->text();
  return found;
}

std::string complaint_of(const std::string& words, int ranks) {
  try {
    parse_speeds(words, ranks);
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return {};
}

TEST(Speeds, AreReadInAnyUnitAndSaidAsTheyAreRead) {
  EXPECT_TRUE(parse_speeds("3x2.5", 3).equal());
  EXPECT_TRUE(parse_speeds("1,1", 2).equal());
  EXPECT_EQ(parse_speeds("10,2x5,10", 4), parse_speeds("1,0.5,.5,1", 4));
  EXPECT_EQ(parse_speeds("8x1,8x0.5", 16).text(), "8x1,8x0.5");
  EXPECT_EQ(parse_speeds("1,0.5", 2).parts(1), Speeds::kFastest / 2);
  std::mt19937 bits(1);
  std::uniform_real_distribution<double> any(0.001, 7);
  for (int i = 0; i < 200; ++i) {
    std::vector<double> by_rank(6);
    for (double& speed : by_rank) speed = any(bits);
    const Speeds speeds(by_rank);
    EXPECT_EQ(parse_speeds(speeds.text(), 6), speeds) << speeds.text();
    const Speeds rounded = rounded_speeds(by_rank, 32);
    for (int r = 0; r < rounded.size(); ++r) EXPECT_EQ(rounded.parts(r) % 32, 0);
    EXPECT_EQ(parse_speeds(rounded.text(), 6), rounded);
  }
}

TEST(Speeds, ThatAreNoneAreRefused) {
  for (const char* words : {"",     "1",       "1,1,1",         "3x1",    "0,1",
                            "-1,1", "nan,1",   "inf,1",         "1,fast", "1,",
                            ",1",   "0x1,1,1", "-1x1,1",        "1x,1",   "x1,1",
                            "1;1",  "1e400,1", "99999999999x1", "2x1x1",  "1,0.0001"}) {
    EXPECT_NE(complaint_of(words, 2), "") << words;
  }
  EXPECT_THAT(complaint_of("1,0", 2), testing::HasSubstr("'0' in '1,0' is no positive number"));
  EXPECT_THAT(complaint_of("1,1,1", 2), testing::HasSubstr("more ranks than there are, 2"));
  EXPECT_THAT(complaint_of("1", 2), testing::HasSubstr("speeds of 1 ranks, but there are 2"));
}

TEST(Balanced, DealsEachTokenOnceAndAreaAsRanksAreFast) {
  std::mt19937 bits(2);
  const Shape shape{4096, 4096, 4, 4, 4, 4, 4};
  const Strategy& ring = *find_strategy("ring");
  for (const char* mask : {"full", "causal", "window:300,0", "documents:2500,900,500,196+causal",
                           "causal@0;window:64,0@1-3", "stream:sink=16,recent=200"}) {
    for (const int ranks : kRanks) {
      const Speeds speeds = speeds_at(ranks, bits);
      const Problem problem = problem_of(shape, mask, ring, "balanced", speeds, ranks);
      std::vector<Index> areas;
      std::vector<Range> owned;
      Index rows = 0;
      for (int r = 0; r < ranks; ++r) {
        const Runs own = problem.queries().positions({problem.queries().rows(r)});
        Index sum = 0;
        for (const auto& [head, times] : variants(problem.mask(), {0, shape.query_heads})) {
          sum += times * area(problem.mask(), head, own, {{0, shape.keys, 1}});
        }
        areas.push_back(sum);
        for (const dattn::Run& run : own) owned.push_back({run.first, run.first + run.count});
        rows += size(own);
        // Memory and hops of a ring follow the rows.
        double speed = 0;
        for (int other = 0; other < ranks; ++other) speed += speeds.of(other);
        EXPECT_NEAR(static_cast<double>(size(own)), 4096 * speeds.of(r) / speed, 4096 * 0.03)
            << mask << ", " << speeds.text() << ", rank " << r;
      }
      EXPECT_EQ(rows, shape.queries);
      EXPECT_EQ(union_of(owned), (Ranges{{0, shape.queries}}));
      EXPECT_LE(longest(areas, speeds), 1.03) << mask << ", " << speeds.text();
    }
  }
}

TEST(Balanced, StaysAsItIsWhereSpeedsAreEqual) {
  const Shape shape{1000, 1000, 4, 2, 2, 4, 4};
  const Strategy& ring = *find_strategy("ring");
  for (const int ranks : kRanks) {
    const Problem none = problem_of(shape, "causal", ring, "balanced", {}, ranks);
    const Problem all =
        problem_of(shape, "causal", ring, "balanced",
                   Speeds(std::vector<double>(static_cast<std::size_t>(ranks), 0.7)), ranks);
    for (int r = 0; r < ranks; ++r) {
      EXPECT_EQ(none.queries().positions({none.queries().rows(r)}),
                all.queries().positions({all.queries().rows(r)}));
    }
  }
}

TEST(Balanced, CutsKeysWithoutQueriesAsRanksAreFast) {
  const Shape shape{8, 3000, 4, 4, 4, 4, 4};
  const Problem problem =
      problem_of(shape, "causal", *find_strategy("tree"), "balanced", Speeds({1, 0.5}), 2);
  EXPECT_EQ(problem.keys().rows(0).size(), 2000);
  const Rehearsal found = rehearsal_of(problem, *find_strategy("tree"), Pass::forward);
  EXPECT_LE(longest(found.pairs, problem.speeds()), 1.01);
}

TEST(Strategies, AreProvedAtAnySpeeds) {
  std::mt19937 bits(3);
  for (const Strategy& strategy : strategies()) {
    for (const auto& [queries, keys, mask] :
         {std::tuple{61, 61, "causal"}, std::tuple{61, 61, "window:9,2"},
          std::tuple{61, 61, "causal@0-1;window:3,0@2-5"}, std::tuple{5, 5, "full"},
          std::tuple{7, 61, "causal"}}) {
      const Shape shape{queries, keys, 6, 3, 3, 4, 4};
      for (const int ranks : kRanks) {
        const Speeds speeds = speeds_at(ranks, bits, 1);
        for (const PartitionKind& partition : partition_kinds()) {
          const Problem problem = problem_of(shape, mask, strategy, partition.name, speeds, ranks);
          if (strategy.refuses(problem)) continue;
          for (const Pass pass : {Pass::forward, Pass::backward}) {
            if (pass == Pass::backward && strategy.backward == nullptr) continue;
            rehearsal_of(problem, strategy, pass);
          }
        }
      }
    }
  }
}

TEST(Strategies, GiveRanksAsMuchAsTheyAreFast) {
  const Shape shape{2048, 2048, 32, 8, 8, 4, 4};
  const char* any = "1,0.5,0.75,1";
  for (const auto& [name, partition, bound, words] :
       {std::tuple{"ring", "balanced", 1.02, any}, std::tuple{"gather", "balanced", 1.02, any},
        std::tuple{"double_ring", "balanced", 1.02, any},
        std::tuple{"lightseq", "contiguous", 1.01, any},
        std::tuple{"lightseq", "balanced", 1.02, any}, std::tuple{"ulysses", "zigzag", 1.1, any},
        // Ranks of one place share their heads, so these can follow groups that differ, or places.
        std::tuple{"usp", "balanced", 1.02, "2x1,2x0.5"},
        std::tuple{"usp", "zigzag", 1.1, "1,0.5,1,0.5"}}) {
    const Speeds speeds = parse_speeds(words, 4);
    const Strategy& strategy = *find_strategy(name);
    const Problem problem = problem_of(shape, "causal", strategy, partition, speeds, 4);
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      const Rehearsal found = rehearsal_of(problem, strategy, pass);
      EXPECT_LE(longest(found.pairs, speeds), bound) << name << ", " << partition;
    }
  }
}

TEST(Mixed, PlacesWholeHeadsAsRanksAreFast) {
  const Shape shape{512, 512, 22, 22, 22, 4, 4};
  const Strategy& mixed = *find_strategy("mixed");
  const Problem problem =
      problem_of(shape, "causal@0-1;window:3,0@2-21", mixed, "balanced", Speeds({1, 0.25, 1}), 3);
  std::vector<Index> heads;
  for (const Ranges& whole : problem.head_split().whole) heads.push_back(size(whole));
  EXPECT_THAT(heads, testing::ElementsAre(9, 2, 9));
}

TEST(Lightseq, MessagesLeaveWhenTheirTimeComes) {
  // With links that take no time nobody waits for a rank that is slower than itself.
  const Machine free{0, 1e300, 1e9, 0};
  const Shape shape{1024, 1024, 8, 8, 8, 4, 4};
  const Strategy& lightseq = *find_strategy("lightseq");
  for (const char* words : {"1,0.5", "1,0.5,1,0.25", "0.5,1,1,0.3,0.8"}) {
    const int ranks = static_cast<int>(std::count(words, words + std::strlen(words), ',')) + 1;
    const Speeds speeds = parse_speeds(words, ranks);
    const Problem problem = problem_of(shape, "causal", lightseq, "contiguous", speeds, ranks);
    const Rehearsal found = rehearsal_of(problem, lightseq, Pass::forward, free);
    double speed = 0;
    for (int r = 0; r < ranks; ++r) speed += speeds.of(r);
    const double ideal =
        static_cast<double>(found.pairs_total()) * shape.flops_per_pair() / free.rate / speed;
    EXPECT_LE(found.forecast_seconds(), 1.1 * ideal) << words;
  }
}

TEST(Forecast, KnowsSpeedsAndChoosesByThem) {
  const Shape shape{2048, 2048, 4, 4, 4, 64, 64};
  const Machine machine{1e-6, 1e10, 1e9, 1e-7};
  Wish wish;
  wish.strategy = "ring";
  wish.ranks = 4;
  const MaskPtr mask = parse_mask("causal", shape);
  const Choice even = choose(wish, shape, mask, Type::f4, machine);
  wish.speeds = Speeds({1, 1, 0.5, 1});
  const Choice choice = choose(wish, shape, mask, Type::f4, machine);
  EXPECT_EQ(choice.problem->partition(), "balanced");
  const Rehearsal found = rehearsal_of(*choice.problem, *choice.strategy, Pass::forward, machine);
  for (int r = 0; r < wish.ranks; ++r) {
    const auto at = static_cast<std::size_t>(r);
    EXPECT_NEAR(found.compute_seconds[at],
                static_cast<double>(found.pairs[at]) * shape.flops_per_pair() / machine.rate /
                    wish.speeds.of(r),
                1e-6);
  }
  // Dealt evenly, all wait for the slowest rank.
  wish.partition = std::string(even.problem->partition());
  const Choice slow = choose(wish, shape, mask, Type::f4, machine);
  const Rehearsal waits = rehearsal_of(*slow.problem, *slow.strategy, Pass::forward, machine);
  EXPECT_GT(waits.forecast_seconds(), 1.5 * found.forecast_seconds());
}

}  // namespace
}  // namespace dattn
