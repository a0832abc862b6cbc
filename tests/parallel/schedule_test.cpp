// How even the schedule of lightseq is, and what it looks like where it can be said by hand.
#include "parallel/schedule.hpp"

#include <gmock/gmock.h>

#include <cmath>
#include <cstdio>
#include <random>

#include "parallel/planner.hpp"
#include "parallel/rehearse.hpp"
#include "parallel/strategies/lightseq.hpp"
#include "tests/cases.hpp"

namespace dattn {
namespace {

/// What a mean rank computes over what the most loaded one does: pairs / (ranks x most pairs).
double evenness(const Problem& problem, Pass pass) {
  const Schedule& schedule = problem.schedule(pass);
  return static_cast<double>(schedule.total()) /
         (static_cast<double>(problem.ranks()) * static_cast<double>(schedule.most()));
}

/// The ideal time (one rank's kernel on 1/P of the pairs) over the forecast of lightseq's plan with
/// messages and steps that take no time.
double free_network_efficiency(const Problem& problem, Pass pass) {
  const Machine free{0, 1e300, 1e9, 0};
  const Plan plan = make_plan(*find_strategy("lightseq"), problem, pass);
  const Rehearsal found = rehearse(problem, plan, free);
  EXPECT_FALSE(found.fault) << found.fault->text();
  const Shape& shape = problem.shape();
  const double flops =
      pass == Pass::forward ? shape.flops_per_pair() : shape.backward_flops_per_pair();
  const double ideal =
      static_cast<double>(found.pairs_total()) * flops / free.rate / problem.ranks();
  return ideal / found.forecast_seconds();
}

/// Lengths of packed documents as in pre-training data: log-normal with a long tail (sigma 1.3, the
/// longest hundreds of times the shortest).
std::string documents(Index tokens, double median, unsigned seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<double> normal;
  std::string words = "documents:";
  while (tokens > 0) {
    const double length = median * std::exp(1.3 * normal(bits));
    const Index next = std::min(tokens, std::max<Index>(1, std::llround(length)));
    tokens -= next;
    words += std::to_string(next) + (tokens > 0 ? "," : "+causal");
  }
  return words;
}

const Heads kEven[] = {{4, 4, 4}, {8, 2, 2}, {5, 1, 1}, {6, 3, 2}};

TEST(EvenSchedule, OfCausalIsNearIdealAtEveryP) {
  for (int ranks = 2; ranks <= 16; ++ranks) {
    double least[2] = {1, 1};
    for (const Heads heads : kEven) {
      for (const Index tokens : {128 * ranks, 128 * ranks + 5}) {
        const Shape shape = shape_of({tokens, tokens}, heads);
        const Problem problem(shape, parse_mask("causal", shape), line(ranks), "contiguous");
        for (const Pass pass : {Pass::forward, Pass::backward}) {
          least[0] = std::min(least[0], evenness(problem, pass));
          least[1] = std::min(least[1], free_network_efficiency(problem, pass));
        }
      }
    }
    std::printf("  causal, %2d ranks: evenness %.4f, free network %.4f\n", ranks, least[0],
                least[1]);
    EXPECT_GE(least[0], 0.99) << ranks;
    EXPECT_GE(least[1], 0.99) << ranks;
  }
}

TEST(EvenSchedule, OfDocumentsIsNearIdealAtEveryP) {
  for (int ranks = 2; ranks <= 16; ++ranks) {
    double least[2] = {1, 1};
    double own = 1;
    for (unsigned seed = 0; seed < 4; ++seed) {
      const Index tokens = 512 * ranks;
      const Shape shape = shape_of({tokens, tokens}, kEven[seed % 2]);
      const MaskPtr mask = parse_mask(documents(tokens, 100, seed), shape);
      const Problem problem(shape, mask, line(ranks), "contiguous");
      for (const Pass pass : {Pass::forward, Pass::backward}) {
        least[0] = std::min(least[0], evenness(problem, pass));
        least[1] = std::min(least[1], free_network_efficiency(problem, pass));
      }
      const Rehearsal gather = rehearse(problem, make_plan(*find_strategy("gather"), problem));
      own = std::min(own, static_cast<double>(gather.pairs_total()) / ranks /
                              static_cast<double>(
                                  *std::max_element(gather.pairs.begin(), gather.pairs.end())));
    }
    std::printf("  documents, %2d ranks: evenness %.4f, free network %.4f (no help: %.4f)\n", ranks,
                least[0], least[1], own);
    EXPECT_GE(least[0], 0.97) << ranks;
    EXPECT_GE(least[1], 0.97) << ranks;
  }
}

TEST(Planner, ChoosesHelpForDocuments) {
  const Index tokens = 8 * 2048;
  const Shape shape{tokens, tokens, 32, 8, 8, 128, 128};
  const MaskPtr mask = parse_mask(documents(tokens, 400, 1), shape);
  Wish wish;
  wish.ranks = 8;
  const Choice choice = choose(wish, shape, mask, Type::f4, {});
  EXPECT_EQ(choice.strategy->name, "lightseq") << choice.problem->partition();
  wish.strategy = "double_ring";
  wish.mesh = {2, 4};
  const Choice named = choose(wish, shape, mask, Type::f4, {});
  EXPECT_EQ(named.problem->mesh(), (Mesh{{{"outer", 2}, {"inner", 4}}}));
}

// Areas are more even under partitions that deal rows out, by less than a forecast can tell, and
// all keys would travel.
TEST(Planner, KeepsTheHaloOfAWindowSmall) {
  const Shape shape{32768, 32768, 4, 1, 1, 128, 128};
  const auto expect_contiguous = [&](const char* mask, bool gradients) {
    Wish wish;
    wish.ranks = 4;
    wish.gradients = gradients;
    wish.strategy = "gather";
    const Choice choice = choose(wish, shape, parse_mask(mask, shape), Type::f4, {});
    EXPECT_EQ(choice.problem->partition(), "contiguous") << mask << " " << gradients;
  };
  expect_contiguous("window:1023,0", false);
  expect_contiguous("window:1023,0", true);
  expect_contiguous("neighbor:dims=256x128,window=32,stride=16,tile=8", false);
  expect_contiguous("neighbor:dims=256x128,window=32,stride=16,tile=8", true);
}

// Under a halo on both sides a rank computes at times 0, 1 and P - 1. What its neighbours send and
// give back comes while it computes, not while it waits at the times in between. Of keys the links
// are as slow as one stage can hide, and gradients, the last of which nothing hides, are few.
TEST(Pull, HidesAHaloBehindTheStagesWithWork) {
  const Shape shape{32768, 32768, 4, 1, 1, 128, 128};
  const char* halo = "neighbor:dims=128x256,window=32,stride=16,tile=8";
  for (const auto& [pass, bandwidth] : {std::pair{Pass::forward, 2e8}, {Pass::backward, 1e10}}) {
    const Machine machine{.latency = 1e-6, .bandwidth = bandwidth, .rate = 1e11};
    for (const int ranks : {4, 8}) {
      const Problem problem(shape, parse_mask(halo, shape), line(ranks), "contiguous");
      const Plan plan = make_plan(*find_strategy("gather"), problem, pass);
      const Rehearsal found = rehearse(problem, plan, machine);
      double longest = 0;
      for (const double seconds : found.compute_seconds) longest = std::max(longest, seconds);
      EXPECT_LE(found.forecast_seconds(), 1.01 * longest) << name_of(pass) << ranks;
    }
  }
}

// In a ring under documents some hops see nothing: they are over before the next ones that count
// have arrived.
TEST(Planner, FetchesFurtherAheadWhereItPaysAndFits) {
  const Shape shape{32768, 32768, 8, 2, 2, 128, 128};
  const char* documents = "documents:9000,3000,500,12000,8268";
  Wish wish;
  wish.ranks = 8;
  wish.strategy = "ring";
  wish.partition = "contiguous";
  const auto chosen = [&](const char* mask) {
    return choose(wish, shape, parse_mask(mask, shape), Type::f4, {});
  };
  const auto seconds = [](const Choice& c) {
    return rehearse(*c.problem, make_plan(*c.strategy, *c.problem)).forecast_seconds();
  };
  wish.memory = Index{1} << 40;
  const Choice far = chosen(documents);
  EXPECT_EQ(far.problem->prefetch(), 2);
  for (const char* mask : {"full", "causal"})
    EXPECT_EQ(chosen(mask).problem->prefetch(), 1) << mask;
  wish.memory = far.needs - 1;
  const Choice near = chosen(documents);
  EXPECT_EQ(near.problem->prefetch(), 1);
  EXPECT_LT(near.needs, far.needs);
  EXPECT_LT(seconds(far), 0.9 * seconds(near));
  for (const int stages : {1, 3}) {
    wish.memory = 0;
    wish.prefetch = stages;
    EXPECT_EQ(chosen(documents).problem->prefetch(), stages);
  }
}

// Under a window zigzag shards see little of some others, so ranks are at different stages. What
// one fetches was sent at the start, and does not wait until its owner is there.
TEST(Gather, LetsNobodyWaitForAnOwnersStage) {
  for (const int ranks : {4, 5, 8}) {
    const Shape shape{16384, 16384, 8, 2, 2, 128, 128};
    const Problem p(shape, parse_mask("window:3000,0", shape), line(ranks), "zigzag");
    const Rehearsal found = rehearse(p, make_plan(*find_strategy("gather"), p));
    const double wait = *std::max_element(found.wait_seconds.begin(), found.wait_seconds.end());
    EXPECT_LE(wait, 0.02 * found.forecast_seconds()) << ranks << " ranks";
  }
}

// The last sums go home while what needs no message is computed, and so nothing waits for them.
TEST(EvenSchedule, HidesItsLastSums) {
  const Machine slow{.bandwidth = 5e8, .rate = 1e11};
  for (const int ranks : {2, 3, 4, 5, 8}) {
    for (const char* partition : {"contiguous", "zigzag"}) {
      for (const Pass pass : {Pass::forward, Pass::backward}) {
        const Shape shape{16384, 16384, 8, 2, 2, 128, 128};
        const Problem p(shape, parse_mask("causal", shape), line(ranks), partition);
        const Rehearsal found = rehearse(p, make_plan(*find_strategy("lightseq"), p, pass), slow);
        const double wait = *std::max_element(found.wait_seconds.begin(), found.wait_seconds.end());
        EXPECT_LE(wait, 1e-3 * found.forecast_seconds())
            << ranks << " ranks, " << partition << ", " << name_of(pass);
      }
    }
  }
}

/// A causal problem of `rows` tokens a rank, dealt out contiguously.
Problem causal(int ranks, Index rows) {
  const Shape shape = shape_of({rows * ranks, rows * ranks}, {2, 2, 2});
  return {shape, parse_mask("causal", shape), line(ranks), "contiguous"};
}

/// What rank r computes in step t of LightSeq: for itself, or for a rank past it.
std::pair<int, int> queries_and_keys(int r, int t, int ranks) {
  return t <= r ? std::pair(r, r - t) : std::pair(r - t + ranks, r);
}

TEST(EvenSchedule, OfCausalIsLightSeqsWithoutItsHoleAndBubble) {
  for (int ranks = 2; ranks <= 16; ++ranks) {
    const Problem problem = causal(ranks, 4);
    const Schedule& schedule = problem.schedule(Pass::forward);
    EXPECT_EQ(schedule.total(), ranks * schedule.most());
    for (int r = 0; r < ranks; ++r) {
      const auto at = schedule.at(r);
      ASSERT_EQ(static_cast<int>(at.size()), ranks / 2 + 2) << ranks;
      for (int i = 0; i < ranks / 2 + 2; ++i) {
        const Piece& piece = at[static_cast<std::size_t>(i)];
        const bool last = i == ranks / 2 + 1;
        const int t = last ? 0 : i;
        EXPECT_EQ(std::pair(piece.queries, piece.keys), queries_and_keys(r, t, ranks))
            << ranks << " ranks, rank " << r << ", step " << t;
        EXPECT_EQ(piece.last, last);
        Range heads{0, 2};
        // Of its own keys a rank leaves half for the end, between heads.
        if (t == 0) (last ? heads.begin : heads.end) = 1;
        // The pair at half way has both ranks: the helper takes the later heads.
        if (2 * t == ranks) (t <= r ? heads.end : heads.begin) = 1;
        EXPECT_EQ(piece.heads, heads) << ranks << " ranks, rank " << r << ", step " << t;
        EXPECT_EQ(piece.rows, problem.queries().rows(piece.queries));
      }
    }
  }
}

TEST(EvenSchedule, OfBackwardKeepsTheKeysWhereQueriesAreFewerBytes) {
  for (const Heads heads : {Heads{2, 2, 2}, Heads{2, 1, 1}}) {
    // Per token 3 d + 2 numbers a query head against 4 d a key head.
    const bool keys_stay = heads.key == heads.query;
    for (int ranks = 2; ranks <= 9; ++ranks) {
      const Shape shape = shape_of({8 * ranks, 8 * ranks}, heads, 4, 4);
      const Problem problem(shape, parse_mask("causal", shape), line(ranks), "contiguous");
      Index stays = 0;
      Index helps = 0;
      for (const Piece& piece : problem.schedule(Pass::backward).pieces()) {
        if (piece.queries == piece.keys) continue;
        (piece.at == (keys_stay ? piece.keys : piece.queries) ? stays : helps) += piece.pairs;
      }
      // As many help as forward: P^2 / 8 of P (P - 1) / 2, one less of eight at odd P.
      const Index eighths = ranks * ranks - ranks % 2;
      EXPECT_EQ(helps * (4 * ranks * (ranks - 1)), (stays + helps) * eighths) << ranks;
    }
  }
}

Plan plan_of(const Problem& problem, const Schedule& schedule, Pass pass = Pass::forward) {
  Plan plan;
  for (int r = 0; r < problem.ranks(); ++r) plan.push_back(follow(problem, schedule, r, pass));
  return plan;
}

/// LightSeq's schedule as published: up to step P/2 for oneself, before step P/2 for others.
Schedule published(const Problem& problem) {
  const int ranks = problem.ranks();
  std::vector<Piece> pieces;
  for (int r = 0; r < ranks; ++r) {
    for (int t = 0; t <= ranks / 2; ++t) {
      if (t > r && t >= ranks / 2) continue;
      const auto [queries, keys] = queries_and_keys(r, t, ranks);
      const Index rows = problem.queries().rows(r).size();
      const Index pairs = 2 * (t == 0 ? rows * (rows + 1) / 2 : rows * rows);
      pieces.push_back({r, queries, keys, {0, 2}, problem.queries().rows(queries), pairs});
    }
  }
  return Schedule(problem, std::move(pieces));
}

TEST(PublishedSchedule, DropsPairsWhereRanksAreOddAndIdlesWhereEven) {
  const Problem five = causal(5, 4);
  const auto fault = rehearse(five, plan_of(five, published(five))).fault;
  ASSERT_TRUE(fault);
  EXPECT_EQ(fault->rank, 3);
  EXPECT_THAT(fault->text(), testing::HasSubstr("pair (h0, q12, k0) is computed 0 times"));
  for (const int ranks : {2, 4, 8}) {
    const Problem problem = causal(ranks, 64);
    const Schedule old = published(problem);
    const Rehearsal found = rehearse(problem, plan_of(problem, old));
    ASSERT_FALSE(found.fault) << found.fault->text();
    const double even = static_cast<double>(old.total()) / static_cast<double>(old.most()) / ranks;
    EXPECT_NEAR(even, ranks / (ranks + 1.0), 0.01);
  }
}

TEST(Schedule, IsRefusedWithAnyPieceLeftOutOrDoubled) {
  for (const int ranks : {3, 4}) {
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      const Problem problem = causal(ranks, 4);
      const auto fault = [&](std::vector<Piece> pieces) {
        return rehearse(problem, plan_of(problem, Schedule(problem, std::move(pieces)), pass))
            .fault;
      };
      const std::vector<Piece>& whole = problem.schedule(pass).pieces();
      for (std::size_t i = 0; i < whole.size(); ++i) {
        std::vector<Piece> less = whole;
        less.erase(less.begin() + static_cast<std::ptrdiff_t>(i));
        const auto missing = fault(less);
        ASSERT_TRUE(missing) << i;
        EXPECT_THAT(missing->text(), testing::HasSubstr("is computed 0 times"));
        std::vector<Piece> more = whole;
        more.push_back(whole[i]);
        more.back().at = (whole[i].at + 1) % ranks;
        const auto twice = fault(more);
        ASSERT_TRUE(twice) << i;
        EXPECT_THAT(twice->text(), testing::HasSubstr("is computed again"));
      }
    }
  }
}

}  // namespace
}  // namespace dattn
