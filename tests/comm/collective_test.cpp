#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>

#include "comm/error.hpp"
#include "tests/comm/affine.hpp"
#include "tests/mpi_main.hpp"

namespace dattn::comm {
namespace {

/// By bytes: as the default, some records at a time, fewer than one record.
class CollectiveTest : public testing::TestWithParam<std::int64_t> {
 protected:
  void SetUp() override { world().set_options({.message_limit = GetParam(), .deadline = 20}); }
};

/// Adds byte by byte, modulo 256.
void sum(const std::byte* in, std::byte* inout, std::int64_t records, std::int64_t record_bytes) {
  for (std::int64_t i = 0; i < records * record_bytes; ++i) {
    inout[i] = static_cast<std::byte>(std::to_integer<int>(in[i]) + std::to_integer<int>(inout[i]));
  }
}

TEST_P(CollectiveTest, AllReduceCombinesWholeRecordsInRankOrder) {
  for (const std::size_t count : {0U, 1U, 2U, 13U, 1000U}) {
    if (count > 100 && GetParam() < 1000) continue;
    std::vector<Affine> mine = affine_records(world().rank(), count);
    world().all_reduce(std::as_writable_bytes(std::span(mine)), sizeof(Affine),
                       operation<compose>(false));
    EXPECT_EQ(mine, composed(world().size(), count)) << count;
  }
}

TEST_P(CollectiveTest, AllReduceOfManyRecordsWithAnOperationThatCommutes) {
  // Long enough for the ring algorithm, which cuts between records.
  const std::size_t records = GetParam() < 1000 ? 20 : 30000;
  std::vector<std::byte> mine(records * 7);
  std::vector<std::byte> expected(mine.size());
  for (std::size_t i = 0; i < mine.size(); ++i) {
    for (int r = 0; r < world().size(); ++r) {
      const auto value = static_cast<std::byte>(static_cast<std::size_t>(r + 3) * i + i / 256);
      if (r == world().rank()) mine[i] = value;
      expected[i] =
          static_cast<std::byte>(std::to_integer<int>(expected[i]) + std::to_integer<int>(value));
    }
  }
  world().all_reduce(mine, 7, operation<sum>());
  EXPECT_EQ(mine, expected);
}

TEST_P(CollectiveTest, ReduceScatterWithUnevenCounts) {
  for (const bool some_empty : {false, true}) {
    std::vector<std::int64_t> counts;
    for (int r = 0; r < world().size(); ++r) {
      counts.push_back(some_empty && r % 2 == 0 ? 0 : (r * 5) % 7 + 1);
    }
    const auto me = counts.begin() + world().rank();
    const std::int64_t all = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
    const std::int64_t before = std::accumulate(counts.begin(), me, std::int64_t{0});
    const std::vector<Affine> in = affine_records(world().rank(), static_cast<std::size_t>(all));
    std::vector<Affine> out(static_cast<std::size_t>(*me));
    world().reduce_scatter(std::as_bytes(std::span(in)), std::as_writable_bytes(std::span(out)),
                           counts, sizeof(Affine), operation<compose>(false));
    const std::vector<Affine> whole = composed(world().size(), static_cast<std::size_t>(all));
    const std::vector<Affine> expected(whole.begin() + before, whole.begin() + before + *me);
    EXPECT_EQ(out, expected);
    EXPECT_EQ(in, affine_records(world().rank(), static_cast<std::size_t>(all)));
  }
}

TEST_P(CollectiveTest, Broadcast) {
  for (int root = 0; root < world().size(); ++root) {
    for (const std::size_t length : {0U, 1U, 100U}) {
      const std::string said(length, static_cast<char>('a' + root));
      std::string text = world().rank() == root ? said : "something else";
      world().broadcast(text, root);
      EXPECT_EQ(text, said);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Limits, CollectiveTest, testing::Values(1 << 30, 40, 5));

TEST(Collective, GatherTakesTextsOfAnyLength) {
  std::vector<std::string> expected;
  for (int r = 0; r < world().size(); ++r) {
    expected.push_back(
        std::string(static_cast<std::size_t>(r * 3 % 5), static_cast<char>('a' + r)));
  }
  const std::string mine = expected[static_cast<std::size_t>(world().rank())];
  const int root = world().size() - 1;
  const std::vector<std::string> none;
  EXPECT_EQ(world().gather(mine, root), world().rank() == root ? expected : none);
  EXPECT_EQ(world().all_gather(mine), expected);
}

TEST(Collective, NumbersReduce) {
  const int ranks = world().size();
  const double mine = world().rank() + 1;
  std::vector<double> values{mine, -mine};
  world().all_reduce_sum(values);
  EXPECT_EQ(values, (std::vector<double>{ranks * (ranks + 1) / 2.0, -ranks * (ranks + 1) / 2.0}));
  values = {mine, -mine};
  world().all_reduce_max(values);
  EXPECT_EQ(values, (std::vector<double>{1.0 * ranks, -1}));
  values = {mine, -mine};
  world().all_reduce_min(values);
  EXPECT_EQ(values, (std::vector<double>{1, -1.0 * ranks}));

  const std::int64_t big = std::int64_t{1} << 40;
  std::vector<std::int64_t> longs{big + world().rank()};
  world().all_reduce_sum(longs);
  EXPECT_EQ(longs[0], ranks * big + ranks * (ranks - 1) / 2);
  longs = {big + world().rank()};
  world().all_reduce_max(longs);
  EXPECT_EQ(longs[0], big + ranks - 1);
  longs = {big + world().rank()};
  world().all_reduce_min(longs);
  EXPECT_EQ(longs[0], big);
}

TEST(Collective, SplitOrdersByKeyAndKeepsPartsApart) {
  const int rank = world().rank();
  Communicator part = world().split(rank % 2, -rank);
  const int members = (world().size() + 1 - rank % 2) / 2;
  ASSERT_EQ(part.size(), members);
  EXPECT_EQ(part.rank(), members - 1 - rank / 2);
  EXPECT_EQ(part.options().deadline, world().options().deadline);
  for (const std::string& text : part.all_gather(std::to_string(rank))) {
    EXPECT_EQ(std::stoi(text) % 2, rank % 2);
  }
  std::vector<std::int64_t> count{1};
  part.all_reduce_sum(count);
  EXPECT_EQ(count[0], members);
}

TEST(Collective, AMissingRankEndsInATimeoutThatNamesTheCollective) {
  if (world().size() == 1) GTEST_SKIP() << "one rank waits for nobody";
  Communicator all = world().split(0, world().rank());
  all.set_deadline(0.05);
  if (world().rank() != 0) {
    try {
      all.barrier();
      ADD_FAILURE() << "rank 0 was not there";
    } catch (const Timeout& error) {
      EXPECT_NE(std::string(error.what()).find("barrier of 0 bytes at rank"), std::string::npos);
    }
  }
  world().barrier();
  // Rank 0 catches up, so that nothing is left over for MPI_Finalize to wait for.
  if (world().rank() == 0) {
    all.set_deadline(20);
    all.barrier();
  }
  world().barrier();
}

TEST(Collective, BrokenPreconditionsThrow) {
  std::vector<std::byte> bytes(10);
  const std::vector<std::int64_t> counts(static_cast<std::size_t>(world().size()), 2);
  EXPECT_THROW(world().all_reduce(bytes, 3, operation<sum>()), std::invalid_argument);
  EXPECT_THROW(world().all_reduce(bytes, 0, operation<sum>()), std::invalid_argument);
  EXPECT_THROW(world().reduce_scatter(bytes, bytes, counts, 3, operation<sum>()),
               std::invalid_argument);
  EXPECT_THROW(static_cast<void>(world().split(-1, 0)), std::invalid_argument);
}

TEST(Collective, TheHostHasAName) { EXPECT_FALSE(processor_name().empty()); }

}  // namespace
}  // namespace dattn::comm
