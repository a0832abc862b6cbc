// Which stages of pulled keys are one call of the kernel.
#include <gtest/gtest.h>

#include <algorithm>

#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"
#include "parallel/strategies/gather.hpp"

namespace dattn {
namespace {

struct Calls {
  std::size_t least, most;  ///< calls of the kernel of a rank
};

Calls calls_of(const char* mask, Pass pass, int ranks,
               Shape shape = {2048, 2048, 4, 2, 2, 16, 16}) {
  const Problem problem(shape, parse_mask(mask, shape), line(ranks), "contiguous", Type::f4,
                        Wire::exact, {});
  const auto known = strategies();
  const auto gather =
      std::find_if(known.begin(), known.end(), [](const auto& s) { return s.name == "gather"; });
  const Plan plan = make_plan(*gather, problem, pass);
  const Rehearsal proof = rehearse(problem, plan);
  EXPECT_FALSE(proof.fault) << mask;
  Calls calls{1000, 0};
  for (const Program& program : plan) {
    const auto count = static_cast<std::size_t>(
        std::count_if(program.steps.begin(), program.steps.end(), [](const Step& step) {
          return std::holds_alternative<Attend>(step) ||
                 std::holds_alternative<AttendBackward>(step);
        }));
    calls = {std::min(calls.least, count), std::max(calls.most, count)};
  }
  return calls;
}

TEST(Bundles, OfWhatOwnersGiveLittleOf) {
  // Rank 1 and later see a sink and a halo: with their own keys two calls, not three.
  const Calls stream = calls_of("stream:sink=8,recent=32", Pass::forward, 8);
  EXPECT_EQ(stream.least, 1u);
  EXPECT_EQ(stream.most, 2u);
  // 16 keys of every 256 from each owner before: 7 times 16 are half a shard at most.
  EXPECT_EQ(calls_of("s2:block=16,local=1,stride=16", Pass::forward, 8).most,
            3u);  // two head groups
}

TEST(Bundles, JoinTheOwnKeysWhereCopyingThoseTakesLess) {
  // A row of queries and twice its sums are 4 (64 + 2 * 72) bytes, one of keys 128: 1,024 rows
  // copied, read and written, and 40 fetched at 16 times that, for 832 bytes of each of 1,024
  // queries.
  const Shape grouped{4096, 4096, 4, 1, 1, 16, 16};
  const char* stream = "stream:sink=8,recent=32";
  EXPECT_EQ(calls_of(stream, Pass::forward, 4, grouped).most, 1u);
  EXPECT_EQ(calls_of(stream, Pass::backward, 4, grouped).most, 3u);
  // Each head with keys of its own, 512 bytes of them a row: 2 * 512 is more than 832.
  EXPECT_EQ(calls_of(stream, Pass::forward, 4, {4096, 4096, 4, 4, 4, 16, 16}).most, 2u);
  // Few queries see the halo of a window; many keys would be waited for.
  EXPECT_EQ(calls_of("window:31,0", Pass::forward, 4, grouped).most, 2u);
  EXPECT_EQ(calls_of("window:1023,0", Pass::forward, 4, grouped).most, 2u);
}

TEST(Bundles, OfOwnKeysHaveTheSamePlanOnSeveralHosts) {
  const Shape shape{4096, 4096, 4, 1, 1, 16, 16};
  const auto attends = [&](const Hosts& hosts) {
    const Problem problem = Problem(shape, parse_mask("stream:sink=8,recent=32", shape), line(4),
                                    "contiguous", Type::f4, Wire::exact, {})
                                .across(hosts);
    const Plan plan = make_plan(gather_strategy(), problem, Pass::forward);
    EXPECT_FALSE(rehearse(problem, plan).fault);
    std::vector<std::string> all;
    for (const Program& program : plan) {
      for (const Step& step : program.steps) {
        if (const auto* attend = std::get_if<Attend>(&step)) {
          all.push_back(text(program.slots[static_cast<std::size_t>(attend->k)].block));
        }
      }
    }
    return all;
  };
  EXPECT_EQ(attends(Hosts()), attends(parse_hosts("2x2", 4)));
}

TEST(Bundles, NotOfWholeShards) {
  EXPECT_EQ(calls_of("full", Pass::forward, 8).least, 8u);
  EXPECT_EQ(calls_of("full", Pass::forward, 8).most, 8u);
  EXPECT_EQ(calls_of("causal", Pass::forward, 8).most, 8u);
}

TEST(Bundles, NotWhereSumsGoBack) {
  EXPECT_EQ(calls_of("stream:sink=8,recent=32", Pass::backward, 8).most, 3u);
}

}  // namespace
}  // namespace dattn
