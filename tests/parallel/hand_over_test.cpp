// From the forward pass to the backward pass: what is kept, what that takes, and who decides.
#include <gmock/gmock.h>

#include "parallel/planner.hpp"
#include "tests/cases.hpp"
#include "tests/parallel/interpreter.hpp"

namespace dattn {
namespace {

using testing::HasSubstr;

constexpr Pass kBoth[] = {Pass::forward, Pass::backward};

/// ulysses on 2 ranks, 4 tokens each, 2 heads of 4 numbers; the plans are to be spoilt.
class HandOver : public testing::Test {
 protected:
  HandOver() {
    forward = make_plan(c.how(), p, Pass::forward);
    backward = make_plan(c.how(), p, Pass::backward);
  }

  Program& at(Plan& plan, int rank) { return plan[static_cast<std::size_t>(rank)]; }
  Slot& kept(int rank, std::size_t n) {
    Program& program = at(forward, rank);
    return program.slots[static_cast<std::size_t>(program.kept[n])];
  }
  std::string fault() const {
    const auto found = rehearse(p, forward).fault;
    return found ? found->text() : "none";
  }
  std::string complaint() const {
    const auto found = hand_over(forward, backward);
    return found ? found->text() : "none";
  }
  std::string harm() const { return interpret(p, forward, Weather::Random, 1); }

  Case c{shape_of({8, 8}, {2, 2, 2}), "full", "contiguous", "ulysses", line(2)};
  Problem p = c.problem().keeping(true);
  Plan forward, backward;
};

TEST_F(HandOver, OfUlyssesIsRight) {
  ASSERT_EQ(at(forward, 0).kept.size(), 3u);
  EXPECT_EQ(text(kept(1, 1).block), "K[heads 1, rows 0-7]");
  EXPECT_EQ(fault(), "none");
  EXPECT_EQ(complaint(), "none");
  EXPECT_EQ(harm(), "");
  EXPECT_EQ(kept_slot(at(forward, 0), kept(0, 2).block), at(forward, 0).kept[2]);
  EXPECT_EQ(kept_slot(at(forward, 0), kept(1, 2).block), std::nullopt);
  EXPECT_THAT(text(at(forward, 1)), HasSubstr("  keeps V[heads 1, rows 0-7]@"));
}

TEST_F(HandOver, NeedsAllOfWhatIsKept) {
  // The last message of K never comes into the slot.
  const SlotId k = at(forward, 0).kept[1];
  std::erase_if(at(forward, 0).steps, [&](const Step& step) {
    const auto* recv = std::get_if<Recv>(&step);
    return std::holds_alternative<Attend>(step) || (recv != nullptr && recv->slot == k);
  });
  std::erase_if(at(forward, 1).steps, [&](const Step& step) {
    const auto* send = std::get_if<Send>(&step);
    return send != nullptr && send->peer == 0 && send->block.kind == Kind::K;
  });
  std::erase_if(at(forward, 0).steps, [&](const Step& step) {
    const auto* send = std::get_if<Send>(&step);
    return send != nullptr && send->peer == 0 && send->block.kind == Kind::K;
  });
  EXPECT_EQ(fault(), "rank 0, step " + std::to_string(at(forward, 0).steps.size()) +
                         ": keeps K[heads 0, rows 0-7], which is not in its home");
  EXPECT_NE(harm(), "");
}

TEST_F(HandOver, NeedsItUnharmed) {
  // V of the other rank's heads comes into the home of V when that has been read.
  Program& me = at(forward, 1);
  const SlotId v = me.kept[2];
  Block other = at(forward, 0).slots[static_cast<std::size_t>(at(forward, 0).kept[2])].block;
  const SlotId guest = static_cast<SlotId>(me.slots.size());
  me.slots.push_back({other, me.slots[static_cast<std::size_t>(v)].home});
  me.steps.push_back(Recv{guest, other, 0});
  at(forward, 0).steps.push_back(Send{at(forward, 0).kept[2], other, 1});
  EXPECT_THAT(fault(), HasSubstr("rank 1, step "));
  EXPECT_THAT(fault(), HasSubstr(": keeps V[heads 1, rows 0-7], which is not in its home"));
  EXPECT_NE(harm(), "");
}

TEST_F(HandOver, KeepsInputsOfTheBackwardPassAlone) {
  const std::vector<SlotId> right = at(forward, 0).kept;
  at(forward, 0).kept[0] = at(forward, 0).result(Kind::O).slot;
  EXPECT_THAT(fault(), HasSubstr("rank 0, step 0: keeps O["));
  at(forward, 0).kept[0] = 99;
  EXPECT_THAT(fault(), HasSubstr("rank 0, step 0: there is no slot 99"));
  at(forward, 0).kept = right;
  at(forward, 0).kept.push_back(at(forward, 0).input(Kind::K));
  EXPECT_THAT(fault(), HasSubstr("keeps both K[heads 0, rows 0-7] and K[heads 0-1, rows 0-3]"));
  at(forward, 0).kept = right;
  at(backward, 1).kept = {at(backward, 1).input(Kind::Q)};
  EXPECT_THAT(rehearse(p, backward).fault->text(),
              HasSubstr("rank 1, step 0: keeps Q[heads 1, rows 0-7] in a backward pass"));
}

TEST_F(HandOver, StartsWithWhatIsThere) {
  at(forward, 1).kept.erase(at(forward, 1).kept.begin());
  EXPECT_EQ(complaint(),
            "rank 1, step 0: starts with Q[heads 1, rows 0-7], which the forward pass neither kept "
            "nor was given: it had Q[heads 0-1, rows 4-7]");
}

TEST_F(HandOver, StartsWithAllThatIsKept) {
  backward = make_plan(c.how(), c.problem(), Pass::backward);
  EXPECT_EQ(
      complaint(),
      "rank 0, step 0: does not start with Q[heads 0, rows 0-7], which the forward pass kept");
}

TEST_F(HandOver, StartsWithDoAndStatsOfItsOwn) {
  Program& me = at(backward, 0);
  me.slots[static_cast<std::size_t>(me.input(Kind::dO))].block.rows = {{2, 6}};
  EXPECT_THAT(complaint(), HasSubstr("rank 0, step 0: starts with dO[heads 0-1, rows 2-5]"));
  me.slots[static_cast<std::size_t>(me.input(Kind::dO))].block.rows = {{0, 4}};
  me.slots[static_cast<std::size_t>(me.input(Kind::Stats))].block.rows = {{0, 8}};
  EXPECT_THAT(complaint(), HasSubstr("rank 0, step 0: starts with Stats[heads 0-1, rows 0-7]"));
}

TEST_F(HandOver, IsPartOfTheProofOfBothPasses) {
  Strategy broken = c.how();  // one that forgets to keep
  broken.program = [](const Problem& problem, int rank) {
    return find_strategy("ulysses")->program(problem.keeping(false), rank);
  };
  const auto passes = plan_passes(broken, p, kBoth);
  EXPECT_FALSE(passes[0].rehearsal.fault);
  ASSERT_TRUE(passes[1].rehearsal.fault);
  EXPECT_THAT(passes[1].rehearsal.fault->text(), HasSubstr("neither kept nor was given"));
}

TEST_F(HandOver, WithoutItKeysAreTheRanksOwn) {
  EXPECT_EQ(rehearse(c.problem(), backward).fault->text(),
            "rank 0, step 0: starts with K[heads 0, rows 0-7], which is not its own");
}

TEST(KeptMemory, IsCountedToTheByte) {
  // Per rank 4 tokens of 2 heads: shards of 4 numbers, 128 bytes; by head 8 tokens of 1 head, the
  // same. A record of a Partial has 6 numbers, 192 bytes; Stats of 2, 64.
  const Case c{shape_of({8, 8}, {2, 2, 2}), "full", "contiguous", "ulysses", line(2)};
  const Index one = 128;
  const Index forward = 6 * one + 2 * 192;              // Q, K, V, O, by token and by head
  const Index backward = 2 * (4 * one + 64) + 6 * one;  // and dO, Stats, gradients
  const Index kept_backward = backward - 3 * one;       // no shards of Q, K, V
  const Index kept = 3 * one;
  const auto slots = [&](bool keeps) {
    const Problem p = c.problem().keeping(keeps);
    return slot_bytes(p, plan_passes(c.how(), p, kBoth));
  };
  EXPECT_EQ(slots(false), std::vector<Index>(2, std::max(forward, backward)));
  EXPECT_EQ(slots(true), std::vector<Index>(2, forward + kept_backward - kept));

  const auto needed = [&](bool keeps, const KernelBytes& kernels) {
    const Problem p = c.problem().keeping(keeps);
    const Program last = c.how().backward(p, 1);
    return needs_of(p, c.how().program(p, 1), &last, {.kernels = kernels}).sum();
  };
  const Index results = 192 + one + 3 * one;  // O and LSE, dO, gradients
  EXPECT_EQ(needed(false, {}), results + backward);
  EXPECT_EQ(needed(true, {}), results + forward + kept_backward - kept);
  const auto kernels = [](const Problem&, const Program& program) {
    return Index{program.pass == Pass::forward ? 1000 : 3000};
  };
  EXPECT_EQ(needed(false, kernels), results + backward + 3000);
  EXPECT_EQ(needed(true, kernels), results + forward + kept_backward - kept + 4000);
  // The forward pass may be what needs most.
  const auto more = [](const Problem&, const Program& program) {
    return Index{program.pass == Pass::forward ? 9000 : 0};
  };
  EXPECT_EQ(needed(false, more), 192 + forward + 9000);
}

/// What choose() makes of a limit.
class MemoryLimit : public testing::Test {
 protected:
  MemoryLimit() {
    wish.strategy = "usp";
    wish.partition = "zigzag";
    wish.ranks = 4;
    wish.gradients = true;
  }
  Choice chosen(Index memory) {
    wish.memory = memory;
    return choose(wish, shape, parse_mask("causal", shape), Type::f4, {});
  }

  Shape shape{32, 32, 8, 2, 2, 4, 4};
  Wish wish;
};

TEST_F(MemoryLimit, KeepsWhereTheRankThatNeedsMostHasRoom) {
  const Choice free = chosen(0);
  EXPECT_TRUE(free.problem->keeps());
  const Choice roomy = chosen(Index{1} << 40);
  EXPECT_TRUE(roomy.problem->keeps());
  const Index most = roomy.needs;
  EXPECT_EQ(roomy.needs_to_keep, most);
  EXPECT_TRUE(chosen(most).problem->keeps());
  const Choice tight = chosen(most - 1);
  EXPECT_FALSE(tight.problem->keeps());
  EXPECT_EQ(tight.needs_to_keep, most);
  EXPECT_LT(tight.needs, most);
  EXPECT_FALSE(chosen(tight.needs).problem->keeps());
  try {
    chosen(tight.needs - 1);
    FAIL();
  } catch (const DoesNotFit& e) {
    EXPECT_EQ(e.least.strategy->name, "usp");
    EXPECT_EQ(e.least.needs, tight.needs);
    EXPECT_EQ(e.least.may_use, tight.needs - 1);
  }
}

TEST_F(MemoryLimit, CountsKernels) {
  const Index slots = chosen(Index{1} << 40).needs;
  wish.beside.kernels = [](const Problem&, const Program& program) {
    return Index{program.rank == 2 ? 5000 : 0};
  };
  EXPECT_EQ(chosen(Index{1} << 40).needs, slots + 2 * 5000);
}

TEST_F(MemoryLimit, LeavesOutWhatDoesNotFit) {
  wish.strategy = wish.partition = "auto";
  for (const int ranks : {4, 24}) {
    wish.ranks = ranks;
    const Choice any = chosen(Index{1} << 40);
    const Choice other = chosen(any.needs - 1);
    EXPECT_LT(other.needs, any.needs);
    try {
      chosen(1);
      FAIL();
    } catch (const DoesNotFit& e) {
      EXPECT_LE(e.least.needs, other.needs);
      EXPECT_EQ(chosen(e.least.needs).needs, e.least.needs);
    }
  }
}

TEST_F(MemoryLimit, SaysNothingOfWhatIsNotRedistributed) {
  for (const Strategy& strategy : strategies()) {
    const Mesh mesh = strategy.mesh(4, shape);
    if (strategy.refuses(Problem(shape, parse_mask("full", shape), mesh, "zigzag"))) continue;
    wish.strategy = strategy.name;
    const bool redistributes =
        strategy.name == "ulysses" || strategy.name == "usp" || strategy.name == "usp_inner_ring";
    EXPECT_EQ(chosen(0).problem->keeps(), redistributes) << strategy.name;
    EXPECT_EQ(chosen(Index{1} << 40).needs_to_keep > 0, redistributes) << strategy.name;
  }
  wish.strategy = "usp";
  wish.mesh = {4, 1};  // rings only
  EXPECT_FALSE(chosen(0).problem->keeps());
  wish.mesh = {2, 2};
  wish.gradients = false;
  EXPECT_FALSE(chosen(0).problem->keeps());
  EXPECT_TRUE(make_program(*chosen(0).strategy, *chosen(0).problem, 0, Pass::forward).kept.empty());
}

TEST_F(MemoryLimit, DoesAsItIsTold) {
  wish.keeps = false;
  EXPECT_FALSE(chosen(0).problem->keeps());
  wish.keeps = true;
  EXPECT_TRUE(chosen(0).problem->keeps());
}

}  // namespace
}  // namespace dattn
