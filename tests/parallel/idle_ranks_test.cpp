// More ranks than tokens: those that own nothing have nothing to do, and planning for them costs
// nothing.
#include <gtest/gtest.h>

#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"

namespace dattn {
namespace {

TEST(IdleRanks, HaveNoSteps) {
  const Shape shape{5, 5, 4, 2, 2, 8, 8};
  constexpr int kRanks = 48;
  for (const char* name : {"ring", "gather", "ulysses", "usp", "usp_inner_ring"}) {
    const Strategy& strategy = *find_strategy(name);
    for (const char* partition : {"contiguous", "striped"}) {
      const Problem problem(shape, parse_mask("causal", shape), strategy.mesh(kRanks, shape),
                            partition);
      for (const Pass pass : {Pass::forward, Pass::backward}) {
        const Plan plan = make_plan(strategy, problem, pass);
        const Rehearsal found = rehearse(problem, plan);
        ASSERT_FALSE(found.fault) << name << ": " << found.fault->text();
        int idle = 0;
        for (const Program& program : plan) idle += program.steps.empty() ? 1 : 0;
        // usp's groups of 4 have heads of whoever owns a token among them.
        EXPECT_GE(idle, kRanks - 5 * 4) << name << " " << partition;
      }
    }
  }
}

// Keys that five ranks own go around these five, not around all.
TEST(IdleRanks, AreNotPartOfTheRing) {
  const Shape shape{5, 5, 4, 2, 2, 8, 8};
  const Problem few(shape, parse_mask("full", shape), line(5), "contiguous");
  const Problem many(shape, parse_mask("full", shape), line(48), "contiguous");
  const Strategy& ring = *find_strategy("ring");
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    EXPECT_EQ(rehearse(many, make_plan(ring, many, pass)).bytes_sent_total(),
              rehearse(few, make_plan(ring, few, pass)).bytes_sent_total());
  }
}

}  // namespace
}  // namespace dattn
