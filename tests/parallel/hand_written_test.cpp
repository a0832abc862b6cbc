// Plans written by hand: a good one of a new kind, and one wrong in each way that there is.
#include <gmock/gmock.h>

#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"
#include "parallel/strategies/ring.hpp"
#include "tests/parallel/interpreter.hpp"
#include "tests/parallel/plans.hpp"

namespace dattn {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

Problem problem(int ranks, Index tokens, const std::string& mask = "full") {
  const Shape shape{tokens, tokens, 1, 1, 1, 1, 1};
  return {shape, parse_mask(mask, shape), line(ranks), "contiguous"};
}

std::string fault_of(const Problem& p, const Plan& plan) {
  const auto fault = rehearse(p, plan).fault;
  return fault ? fault->text() : "none";
}

/// Two ranks with their inputs and results; each test adds the slots and the steps. Nothing is
/// left out of what it is told to do.
class HandWritten : public testing::Test {
 protected:
  HandWritten() : p(problem(2, 4)), plan(2) {
    for (int r = 0; r < 2; ++r) {
      Writer me(p, r);
      const auto [q, k, v] = inputs(me);
      const SlotId out = me.slot(owned(p, Kind::O, r));
      plan[static_cast<std::size_t>(r)] = std::move(me).finish(q, k, v, out, owned(p, Kind::O, r));
    }
  }

  SlotId slot(int rank, Block block, int home = -1) {
    Program& me = plan[static_cast<std::size_t>(rank)];
    me.slots.push_back({std::move(block), home < 0 ? me.homes++ : home});
    return static_cast<SlotId>(me.slots.size()) - 1;
  }
  void add(int rank, const Step& step) {
    plan[static_cast<std::size_t>(rank)].steps.push_back(step);
  }
  std::string fault() const { return fault_of(p, plan); }
  /// What the interpreter says of it.
  std::string harm(Weather weather = Weather::Random) const {
    return interpret(p, plan, weather, 1);
  }
  /// Both ranks swap their K and V into new slots, and rank 1 does all its work.
  void swap_keys() {
    for (const int r : {0, 1}) {
      const SlotId k = slot(r, owned(p, Kind::K, 1 - r));
      const SlotId v = slot(r, owned(p, Kind::V, 1 - r));
      add(r, Recv{k, owned(p, Kind::K, 1 - r), 1 - r});
      add(r, Recv{v, owned(p, Kind::V, 1 - r), 1 - r});
      add(r, Send{kK, owned(p, Kind::K, r), 1 - r});
      add(r, Send{kV, owned(p, Kind::V, r), 1 - r});
      if (r == 0) continue;
      add(r, Attend{kQ, kK, kV, kOut});
      add(r, Attend{kQ, k, v, kOut});
    }
  }

  static constexpr SlotId kQ = 0, kK = 1, kV = 2, kOut = 3, kFarK = 4, kFarV = 5;
  Problem p;
  Plan plan;
};

TEST_F(HandWritten, SwapIsRight) {
  swap_keys();
  add(0, Attend{kQ, kK, kV, kOut});
  add(0, Attend{kQ, kFarK, kFarV, kOut});
  EXPECT_EQ(fault(), "none");
  EXPECT_EQ(harm(), "");
}

TEST_F(HandWritten, HelperIsRightAndEven) {
  const Problem causal = problem(3, 12, "causal");
  const Plan helped = helper_plan(causal);
  const Rehearsal found = rehearse(causal, helped);
  ASSERT_FALSE(found.fault) << found.fault->text();
  EXPECT_TRUE(found.dead.empty());
  // A block off the diagonal is 16 pairs, one on it 10: two blocks each.
  EXPECT_EQ(found.pairs, (std::vector<Index>{26, 26, 26}));
  const Index one = 4 * 4;  // bytes of 4 rows of one number
  EXPECT_EQ(found.bytes_sent, (std::vector<Index>{2 * one + 3 * one, 2 * one, one}));
}

TEST_F(HandWritten, StrategyThatDropsABlockAtOddRanksIsRefused) {
  const auto program = [](const Problem& problem, int rank) {
    Program ring = ring_strategy().program(problem, rank);
    if (problem.ranks() % 2 == 0) return ring;
    int hop = 0;
    std::erase_if(ring.steps, [&](const Step& step) {
      return std::holds_alternative<Attend>(step) && hop++ == problem.ranks() / 2;
    });
    return ring;
  };
  Strategy broken = ring_strategy();
  broken.program = program;
  for (int ranks = 1; ranks <= 9; ++ranks) {
    const Problem now = problem(ranks, 20);
    if (ranks % 2 == 0) {
      EXPECT_EQ(fault_of(now, make_plan(broken, now)), "none");
    } else {
      EXPECT_THAT(fault_of(now, make_plan(broken, now)),
                  AllOf(StartsWith("rank 0, step "), HasSubstr("pair (h0, q0, k"),
                        HasSubstr("computed 0 times")))
          << ranks;
    }
  }
  const Problem five = problem(5, 20);  // rank 0 misses what it holds after two hops: rank 3's
  EXPECT_EQ(fault_of(five, make_plan(broken, five)),
            "rank 0, step 20: pair (h0, q0, k12) is computed 0 times in what the rank delivers");
}

TEST_F(HandWritten, PairComputedTwice) {
  swap_keys();
  add(0, Attend{kQ, kK, kV, kOut});
  add(0, Attend{kQ, kFarK, kFarV, kOut});
  add(0, Attend{kQ, kFarK, kFarV, kOut});
  EXPECT_EQ(fault(),
            "rank 0, step 6: pair (h0, q0, k2) is computed again; rank 0, step 5 has it too, and "
            "rank 0 delivers both");
}

TEST_F(HandWritten, CycleOfWaitsThroughOneHome) {
  for (const int r : {0, 1}) {  // each relays what it is still waiting for
    const SlotId k = slot(r, owned(p, Kind::K, 1 - r));
    add(r, Recv{k, owned(p, Kind::K, 1 - r), 1 - r});
    add(r, Send{k, owned(p, Kind::K, 1 - r), 1 - r});
  }
  EXPECT_THAT(fault(), AllOf(StartsWith("rank 0, step 0: "), HasSubstr("never meets its partner"),
                             HasSubstr("the rank stands at step 1")));
  EXPECT_EQ(harm(Weather::Buffered), "deadlock");
}

TEST_F(HandWritten, CycleThatOnlyBuffersWouldBreak) {
  for (const int r : {0, 1}) {  // the Recv reuses the memory that the Send still reads
    const SlotId first = slot(r, owned(p, Kind::K, 1 - r));
    const int home = plan[static_cast<std::size_t>(r)].slots.back().home;
    const SlotId second = slot(r, owned(p, Kind::K, r), home);
    add(r, Recv{first, owned(p, Kind::K, 1 - r), 1 - r});
    add(r, Send{kK, owned(p, Kind::K, r), 1 - r});
    add(r, Send{first, owned(p, Kind::K, 1 - r), 1 - r});
    add(r, Recv{second, owned(p, Kind::K, r), 1 - r});
  }
  EXPECT_THAT(fault(), HasSubstr("never meets its partner"));
  EXPECT_EQ(harm(Weather::Late), "deadlock");
  EXPECT_NE(harm(Weather::Buffered), "deadlock");
}

TEST_F(HandWritten, MessagesCross) {
  const SlotId k = slot(0, owned(p, Kind::K, 1));
  const SlotId v = slot(0, owned(p, Kind::V, 1));
  add(0, Recv{v, owned(p, Kind::V, 1), 1});
  add(0, Recv{k, owned(p, Kind::K, 1), 1});
  add(1, Send{kK, owned(p, Kind::K, 1), 0});
  add(1, Send{kV, owned(p, Kind::V, 1), 0});
  EXPECT_EQ(fault(),
            "rank 0, step 0: expects V[heads 0, rows 2-3] from rank 1, whose step 0 sends K[heads "
            "0, rows 2-3]");
}

TEST_F(HandWritten, ReadsBeforeItIsFilled) {
  const SlotId k = slot(0, owned(p, Kind::K, 1));
  const SlotId v = slot(0, owned(p, Kind::V, 1));
  add(0, Attend{kQ, k, v, kOut});
  EXPECT_THAT(fault(), AllOf(StartsWith("rank 0, step 0: "), HasSubstr("K[heads 0, rows 2-3]")));
}

TEST_F(HandWritten, ReadsWhatHasArrivedInPart) {
  const SlotId k = slot(0, owned(p, Kind::K, 1));
  const Block half{Kind::K, {0, 1}, {{2, 3}}};
  add(1, Send{kK, half, 0});
  add(0, Recv{k, half, 1});
  add(0, Send{k, half, 1});
  EXPECT_THAT(fault(), AllOf(StartsWith("rank 0, step 1: "), HasSubstr("row 3) is not there")));
}

TEST_F(HandWritten, ReadsWhatAnotherSlotHasReplaced) {
  const SlotId k = slot(0, owned(p, Kind::K, 1));
  const int home = plan[0].slots.back().home;
  const SlotId v = slot(0, owned(p, Kind::V, 1), home);
  add(0, Recv{k, owned(p, Kind::K, 1), 1});
  add(0, Recv{v, owned(p, Kind::V, 1), 1});
  add(1, Send{kK, owned(p, Kind::K, 1), 0});
  add(1, Send{kV, owned(p, Kind::V, 1), 0});
  add(0, Attend{kQ, k, v, kOut});
  EXPECT_THAT(fault(), AllOf(StartsWith("rank 0, step 2: "), HasSubstr("is not in its home")));
}

TEST_F(HandWritten, OverwritesAnInput) {
  add(0, Recv{kK, owned(p, Kind::K, 0), 1});
  EXPECT_EQ(fault(), "rank 0, step 0: writes into an input");
}

TEST_F(HandWritten, TwoMessagesIntoOnePart) {
  const SlotId k = slot(0, owned(p, Kind::K, 1));
  for (const Block& block : {owned(p, Kind::K, 1), Block{Kind::K, {0, 1}, {{3, 4}}}}) {
    add(0, Recv{k, block, 1});
    add(1, Send{kK, block, 0});
  }
  add(0, Send{k, owned(p, Kind::K, 1), 0});
  EXPECT_THAT(fault(), AllOf(StartsWith("rank 0, step 2: "), HasSubstr("row 3) is there twice")));
}

TEST_F(HandWritten, PartialThatNoMessageFillsWhole) {
  // The home held keys before: what the message leaves open is not "no key", it is other bytes.
  p = problem(2, 4, "causal");
  const SlotId k = slot(0, owned(p, Kind::K, 1));
  const SlotId found = slot(0, owned(p, Kind::O, 0), plan[0].slots.back().home);
  const Block row{Kind::O, {0, 1}, {{0, 1}}};
  add(0, Recv{k, owned(p, Kind::K, 1), 1});
  add(1, Send{kK, owned(p, Kind::K, 1), 0});
  add(1, Attend{kQ, kK, kV, kOut});
  const SlotId none = slot(1, owned(p, Kind::O, 0));
  add(0, Recv{found, row, 1});
  add(1, Send{none, row, 0});
  add(0, Attend{kQ, kK, kV, kOut});
  add(0, Merge{found, kOut});
  EXPECT_THAT(fault(), AllOf(StartsWith("rank 0, step 3: "), HasSubstr("row 1) is not there")));
  EXPECT_NE(harm(), "");
}

TEST_F(HandWritten, PartialThatAMessageOverwritesInPart) {
  // Row 0 is emptied by the message; row 1 keeps what it had, and then gets it again.
  p = problem(2, 4, "documents:2,2");
  const Block row{Kind::O, {0, 1}, {{0, 1}}};
  const SlotId none = slot(1, owned(p, Kind::O, 0));
  add(1, Send{none, row, 0});
  add(1, Attend{kQ, kK, kV, kOut});
  add(0, Attend{kQ, kK, kV, kOut});
  add(0, Recv{kOut, row, 1});
  add(0, Attend{kQ, kK, kV, kOut});
  EXPECT_THAT(fault(), HasSubstr("pair (h0, q1, k0) is computed again"));
  EXPECT_NE(harm(), "");
}

TEST_F(HandWritten, PartialBehindAnotherSlotOfItsHome) {
  p = problem(2, 4, "documents:2,2");
  const int home = plan[0].homes++;
  slot(0, owned(p, Kind::K, 1), home);
  const SlotId late = slot(0, owned(p, Kind::O, 0), home);
  plan[0].results[0].slot = late;
  add(0, Attend{kQ, kK, kV, late});
  add(1, Attend{kQ, kK, kV, kOut});
  EXPECT_THAT(fault(), AllOf(StartsWith("rank 0, step 0: reads O"), HasSubstr("not in its home")));
  EXPECT_NE(harm(), "");
}

TEST_F(HandWritten, PartsMerge) {
  p = problem(2, 4, "documents:2,2");
  const Ranges row{{1, 2}};
  const SlotId q = slot(0, {Kind::Q, {0, 1}, row});
  const SlotId part = slot(0, {Kind::O, {0, 1}, row});
  const SlotId other_q = slot(0, {Kind::Q, {0, 1}, {{0, 1}}});
  const SlotId rest = slot(0, {Kind::O, {0, 1}, {{0, 1}}});
  for (const auto& [to, out] : {std::pair{q, part}, std::pair{other_q, rest}}) {
    const Block block = plan[0].slots[static_cast<std::size_t>(to)].block;
    add(0, Recv{to, block, 0});
    add(0, Send{kQ, block, 0});
    add(0, Attend{to, kK, kV, out});
  }
  add(1, Attend{kQ, kK, kV, kOut});
  add(0, Merge{part, kOut});
  EXPECT_THAT(fault(), HasSubstr("pair (h0, q0, k0) is computed 0 times"));
  EXPECT_NE(harm(), "");
  add(0, Merge{rest, kOut});
  EXPECT_EQ(fault(), "none");
  EXPECT_EQ(harm(), "");
  add(0, Merge{kOut, rest});  // the whole is no part of a part
  EXPECT_THAT(fault(), HasSubstr("merges O"));
}

TEST_F(HandWritten, WrongKindsAndBlocks) {
  const auto with = [&](const Step& step) {
    Plan wrong = plan;
    wrong[0].steps.push_back(step);
    return fault_of(p, wrong);
  };
  EXPECT_THAT(with(Attend{kQ, kV, kK, kOut}), HasSubstr("where Q, K, V, O are due"));
  EXPECT_THAT(with(Merge{kK, kOut}), HasSubstr("merges K"));
  EXPECT_THAT(with(Merge{kOut, kOut}), HasSubstr("merges O"));
  EXPECT_THAT(with(Reduce{kK, 0}), HasSubstr("reduces K"));
  EXPECT_THAT(with(Reduce{kOut, 1}), HasSubstr("along axis 1"));
  EXPECT_THAT(with(Reduce{kOut, 0}), AllOf(StartsWith("rank 0, step 0: "), HasSubstr("for ever")));
  EXPECT_THAT(with(Send{kK, owned(p, Kind::K, 1), 1}), HasSubstr("is no part of"));
  EXPECT_THAT(with(Send{kK, owned(p, Kind::V, 0), 1}), HasSubstr("is no part of"));
  EXPECT_THAT(with(Send{kK, owned(p, Kind::K, 0), 2}), HasSubstr("there is no rank 2"));
  EXPECT_THAT(with(Send{9, owned(p, Kind::K, 0), 1}), HasSubstr("there is no slot 9"));
  EXPECT_THAT(with(Send{kK, owned(p, Kind::K, 0), 1}), HasSubstr("never meets its partner"));
}

TEST_F(HandWritten, WrongSlots) {
  const auto with = [&](const Block& block, int home) {
    Plan wrong = plan;
    wrong[1].slots.push_back({block, home});
    return fault_of(p, wrong);
  };
  EXPECT_THAT(with(owned(p, Kind::K, 0), 4), HasSubstr("rank 1, step 0: there is no home 4"));
  EXPECT_THAT(with(owned(p, Kind::O, 0), 1), HasSubstr("shares its home with an input"));
  EXPECT_THAT(with({Kind::K, {0, 2}, {{0, 1}}}, 3), HasSubstr("which its tensor does not have"));
  EXPECT_THAT(with({Kind::K, {0, 1}, {{3, 5}}}, 3), HasSubstr("which its tensor does not have"));
  EXPECT_THAT(with({Kind::K, {0, 1}, {{0, 2}, {1, 3}}}, 3), HasSubstr("does not have"));
  std::swap(plan[1].inputs[1], plan[1].inputs[2]);
  EXPECT_THAT(fault(), HasSubstr("as the input K"));
}

TEST_F(HandWritten, WrongResults) {
  EXPECT_THAT(fault_of(p, {plan[0]}), HasSubstr("1 programs for 2 ranks"));
  EXPECT_THAT(fault_of(p, {plan[0], plan[0]}), HasSubstr("says that it is rank 0's"));
  Plan wrong = plan;
  wrong[1].results[0].block.rows = {{3, 4}};
  EXPECT_THAT(fault_of(p, wrong), HasSubstr("row 2) is not there"));
  wrong[1].results[0].block = owned(p, Kind::O, 0);
  EXPECT_THAT(fault_of(p, wrong), AllOf(StartsWith("rank 1, step 0: "), HasSubstr("out of")));
}

TEST_F(HandWritten, StartsWithKeysOfAnotherRank) {
  for (Program& me : plan) {
    me.slots[kK].block.rows = {Range{0, 4}};
    me.slots[kV].block.rows = {Range{0, 4}};
    me.steps.push_back(Attend{kQ, kK, kV, kOut});  // right numbers, but nobody brought the keys
  }
  EXPECT_THAT(fault(), HasSubstr("rank 0, step 0: starts with K[heads 0, rows 0-3], which is not"));
}

TEST_F(HandWritten, ReceivesNobodyReadsAreDead) {
  const SlotId k = slot(0, owned(p, Kind::K, 1));
  p = problem(2, 4, "documents:2,2");
  add(0, Recv{k, owned(p, Kind::K, 1), 1});
  add(1, Send{kK, owned(p, Kind::K, 1), 0});
  for (const int r : {0, 1}) add(r, Attend{kQ, kK, kV, kOut});
  const Rehearsal found = rehearse(p, plan);
  ASSERT_FALSE(found.fault) << found.fault->text();
  EXPECT_EQ(found.dead, (std::vector<std::pair<int, int>>{{0, 0}}));
}

TEST_F(HandWritten, PlansPrintAsText) {
  swap_keys();
  EXPECT_THAT(text(plan[1]), HasSubstr("recv   K[heads 0, rows 0-1] from 0 into home 4\n"));
  EXPECT_THAT(text(plan[1]), HasSubstr("attend Q[heads 0, rows 2-3]@0 to"));
  EXPECT_THAT(text(plan[1]), HasSubstr("  delivers O[heads 0, rows 2-3]\n"));
}

// What nobody brings to a row is in many pieces where the tokens of short documents are dealt one
// by one; a pair among them that is due is found all the same.
TEST(ManyPieces, AStepLeftOutIsMissed) {
  const Shape shape{120, 120, 1, 1, 1, 1, 1};
  std::string documents = "documents:";
  for (Index left = shape.keys, length = 3; left > 0; left -= length, length = length % 9 + 3) {
    length = std::min(length, left);
    documents += std::to_string(length) + (left > length ? "," : "+causal");
  }
  const Problem p{shape, parse_mask(documents, shape), line(5), "striped"};
  for (const char* const name : {"ring", "gather", "lightseq"}) {
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      const Plan plan = make_plan(*find_strategy(name), p, pass);
      ASSERT_EQ(fault_of(p, plan), "none") << name;
      int missed = 0;
      for (std::size_t rank = 0; rank < plan.size(); ++rank) {
        for (std::size_t i = 0; i < plan[rank].steps.size(); ++i) {
          const Step& step = plan[rank].steps[i];
          if (!std::holds_alternative<Attend>(step) &&
              !std::holds_alternative<AttendBackward>(step)) {
            continue;
          }
          Plan less = plan;
          less[rank].steps.erase(less[rank].steps.begin() + static_cast<std::ptrdiff_t>(i));
          const std::string fault = fault_of(p, less);
          EXPECT_NE(fault, "none") << name << ", rank " << rank << ", step " << i;
          missed += fault.find("is computed 0 times") != std::string::npos ? 1 : 0;
        }
      }
      EXPECT_GT(missed, 0) << name;
    }
  }
}

}  // namespace
}  // namespace dattn
