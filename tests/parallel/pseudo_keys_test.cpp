#include "parallel/pseudo_keys.hpp"

#include <gtest/gtest.h>

#include <set>

#include "parallel/rehearse.hpp"
#include "tests/cases.hpp"

namespace dattn {
namespace {

/// Key head 0 keeps all; the other three drop keys, each of them read with two value heads.
const Shape kShape{3, 41, 8, 4, 8, 4, 6};
constexpr const char* kMask = "causal@0-1;stream:sink=2,recent=5@2-7";

Problem problem_of(int ranks, std::string_view partition, Compensate how, Type type = Type::f4) {
  return Problem(kShape, parse_mask(kMask, kShape), line(ranks), partition, type).compensating(how);
}

TEST(PseudoKeys, StandForEveryDroppedKeyOnce) {
  for (const int ranks : {1, 2, 3, 5, 8, 16, 64}) {
    for (const PartitionKind& partition : partition_kinds()) {
      const Problem problem = problem_of(ranks, partition.name, Compensate::head);
      ASSERT_EQ(problem.dropped().size(), 6u);
      // The first query, at 38, sees 0, 1 and 34 to 38.
      for (const Dropped& entry : problem.dropped()) EXPECT_EQ(entry.keys, (Ranges{{2, 34}}));
      const auto by_head = pseudo_keys(problem);
      ASSERT_EQ(by_head.size(), 6u);
      for (const PseudoKey& one : by_head) {
        EXPECT_EQ(one.count, 32);
        EXPECT_EQ(one.rank, -1);
      }
      EXPECT_EQ(pseudo_key_count(problem), 6);
      const Problem other = problem.compensating(Compensate::rank);
      const auto by_rank = pseudo_keys(other);
      EXPECT_EQ(pseudo_key_count(other), std::ssize(by_rank));
      std::set<std::pair<std::size_t, int>> seen;
      std::vector<Index> sums(6, 0);
      for (const PseudoKey& one : by_rank) {
        Index own = 0;
        for (const dattn::Run& run : problem.keys().positions({problem.keys().rows(one.rank)})) {
          own += run.inside({2, 34}).size();
        }
        EXPECT_EQ(one.count, own) << partition.name << ", rank " << one.rank << " of " << ranks;
        EXPECT_GT(one.count, 0);
        EXPECT_TRUE(seen.emplace(one.dropped, one.rank).second);
        sums[one.dropped] += one.count;
      }
      for (const Index sum : sums) EXPECT_EQ(sum, 32);
      EXPECT_TRUE(pseudo_keys(problem.compensating(Compensate::off)).empty());
      EXPECT_EQ(pseudo_key_count(problem.compensating(Compensate::off)), 0);
    }
  }
}

TEST(PseudoKeys, AreInBytesMemoryAndForecastOfEveryPlan) {
  for (const int ranks : {1, 2, 3, 5, 8}) {
    for (const PartitionKind& partition : partition_kinds()) {
      for (const Type type : {Type::bf16, Type::f4, Type::f8}) {
        const Problem off = problem_of(ranks, partition.name, Compensate::off, type);
        for (const Strategy& strategy : strategies()) {
          const Problem plain = off.on(strategy.mesh(ranks, kShape));
          if (strategy.refuses(plain)) continue;
          const Rehearsal before = rehearse(plain, make_plan(strategy, plain));
          const Index sums = 6 * (4 + 6) * 8;  // in double
          const Index number = type == Type::f8 ? 8 : 4;

          const Problem head = plain.compensating(Compensate::head);
          const Rehearsal with = rehearse(head, make_plan(strategy, head));
          ASSERT_FALSE(with.fault) << with.fault->text();
          EXPECT_EQ(with.bytes_sent_total() - before.bytes_sent_total(), 2 * (ranks - 1) * sums);
          EXPECT_EQ(with.messages - before.messages, ranks > 1 ? ranks : 0);
          EXPECT_GT(with.forecast_seconds(), before.forecast_seconds());
          EXPECT_EQ(with.pairs, before.pairs);

          const Problem rank = plain.compensating(Compensate::rank);
          const Rehearsal each = rehearse(rank, make_plan(strategy, rank));
          ASSERT_FALSE(each.fault) << each.fault->text();
          const auto all = pseudo_keys(rank);
          const Index one = (4 + 6) * number;
          EXPECT_EQ(each.bytes_sent_total() - before.bytes_sent_total(),
                    (ranks - 1) * std::ssize(all) * one);
          for (std::size_t r = 0; r < static_cast<std::size_t>(ranks); ++r) {
            Index own = 0;
            for (const PseudoKey& p : all) own += p.rank == static_cast<int>(r) ? 1 : 0;
            EXPECT_EQ(each.bytes_sent[r] - before.bytes_sent[r], (ranks - 1) * own * one);
            EXPECT_EQ(each.memory_bytes[r] - before.memory_bytes[r], sums + std::ssize(all) * one);
            EXPECT_EQ(with.memory_bytes[r] - before.memory_bytes[r], sums + 6 * one);
          }
          EXPECT_EQ(each.links, before.links);
        }
      }
    }
  }
}

TEST(PseudoKeys, HaveNoBackwardPass) {
  const Problem problem = problem_of(2, "contiguous", Compensate::head);
  const Strategy& ring = *find_strategy("ring");
  const Rehearsal found = rehearse(problem, make_plan(ring, problem, Pass::backward));
  ASSERT_TRUE(found.fault);
  EXPECT_NE(found.fault->text().find("no backward pass"), std::string::npos);
}

TEST(PseudoKeys, AreNoneWhereNothingIsDropped) {
  for (const Shape& shape : {Shape{9, 9, 2, 2, 2, 4, 4}, Shape{9, 4, 2, 2, 2, 4, 4}}) {
    const Problem problem =
        Problem(shape, parse_mask("stream:sink=1,recent=1", shape), line(3), "contiguous")
            .compensating(Compensate::rank);
    EXPECT_TRUE(problem.dropped().empty());
    const Problem plain = problem.compensating(Compensate::off);
    const Strategy& ring = *find_strategy("ring");
    const Rehearsal found = rehearse(problem, make_plan(ring, problem));
    const Rehearsal right = rehearse(plain, make_plan(ring, plain));
    EXPECT_EQ(found.bytes_sent, right.bytes_sent);
    EXPECT_EQ(found.memory_bytes, right.memory_bytes);
    EXPECT_EQ(found.messages, right.messages);
  }
}

}  // namespace
}  // namespace dattn
