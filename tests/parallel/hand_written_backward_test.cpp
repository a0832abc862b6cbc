// Backward plans written by hand: a good one, and one wrong in each way that there is.
#include <gmock/gmock.h>

#include "parallel/moves.hpp"
#include "parallel/rehearse.hpp"
#include "tests/parallel/interpreter.hpp"

namespace dattn {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

/// Two ranks of two tokens each under a full mask, with their inputs and gradients; each test adds
/// the slots and the steps.
class HandWrittenBackward : public testing::Test {
 protected:
  HandWrittenBackward() {
    for (int r = 0; r < 2; ++r) {
      Writer me(p, r);
      mine = backward_inputs(me);
      plan.push_back(std::move(me).finish(mine));
    }
  }

  Program& at(int rank) { return plan[static_cast<std::size_t>(rank)]; }
  Block owned(Kind kind, int rank) const { return dattn::owned(p, kind, rank); }
  SlotId slot(int rank, Block block, int home = -1) {
    Program& me = at(rank);
    me.slots.push_back({std::move(block), home < 0 ? me.homes++ : home});
    return static_cast<SlotId>(me.slots.size()) - 1;
  }
  void add(int rank, const Step& step) { at(rank).steps.push_back(step); }
  /// A slot that receives `block`, which the other rank has in its slot `from`.
  SlotId fetch(int rank, const Block& block, SlotId from) {
    const SlotId s = slot(rank, block);
    add(rank, Recv{s, block, 1 - rank});
    add(1 - rank, Send{from, block, rank});
    return s;
  }
  /// Both ranks work on each other's keys and return the gradients; rank 1 does not add those of
  /// the kind `leave_out`.
  void swap_keys(Kind leave_out = Kind::O) {
    AttendBackward far[2] = {mine, mine};
    for (const int r : {0, 1}) {
      far[r].k = fetch(r, owned(Kind::K, 1 - r), mine.k);
      far[r].v = fetch(r, owned(Kind::V, 1 - r), mine.v);
      far[r].dk = slot(r, owned(Kind::dK, 1 - r));
      far[r].dv = slot(r, owned(Kind::dV, 1 - r));
    }
    for (const int r : {0, 1}) {
      add(r, mine);
      add(r, far[r]);
    }
    for (const int r : {0, 1}) {
      for (const Kind kind : {Kind::dK, Kind::dV}) {
        const SlotId back = fetch(r, owned(kind, r), operand(far[1 - r], kind));
        if (r == 0 || leave_out != kind) add(r, Add{back, operand(mine, kind)});
      }
    }
  }
  std::string fault() const {
    const auto found = rehearse(p, plan).fault;
    return found ? found->text() : "none";
  }
  std::string harm(Weather weather = Weather::Random) const {
    return interpret(p, plan, weather, 1);
  }
  std::string with(const Step& step) {
    at(0).steps.push_back(step);
    const std::string found = fault();
    at(0).steps.pop_back();
    return found;
  }

  Shape shape{4, 4, 1, 1, 1, 1, 1};
  Problem p{shape, parse_mask("full", shape), line(2), "contiguous"};
  Plan plan;
  AttendBackward mine;  ///< the same slots on both ranks
};

TEST_F(HandWrittenBackward, SwapIsRight) {
  swap_keys();
  EXPECT_EQ(fault(), "none");
  EXPECT_EQ(harm(), "");
  EXPECT_EQ(rehearse(p, plan).pairs, (std::vector<Index>{8, 8}));
}

TEST_F(HandWrittenBackward, GradientsThatNobodyAdds) {
  swap_keys(Kind::dV);
  EXPECT_EQ(
      fault(),
      "rank 1, step 11: pair (h0, q0, k2) is computed 0 times in dV of what the rank delivers");
  EXPECT_EQ(harm(), "wrong result in row 2");
}

TEST_F(HandWrittenBackward, GradientsAddedTwice) {
  swap_keys();
  const Step again = at(1).steps.back();
  add(1, again);
  EXPECT_THAT(fault(), AllOf(StartsWith("rank 0, step "), HasSubstr("pair (h0, q0, k2)"),
                             HasSubstr("is computed again"), HasSubstr("delivers both in dV")));
  EXPECT_NE(harm(), "");
}

TEST_F(HandWrittenBackward, PairsThatBothRanksCompute) {
  swap_keys();
  const SlotId q = fetch(0, owned(Kind::Q, 1), mine.q);
  AttendBackward helped = mine;
  helped.q = q;
  helped.d_o = fetch(0, owned(Kind::dO, 1), mine.d_o);
  helped.stats = fetch(0, owned(Kind::Stats, 1), mine.stats);
  helped.dq = slot(0, owned(Kind::dQ, 1));
  add(0, helped);  // rank 1 has sent its share of these to dK already; nobody wants this dQ
  EXPECT_THAT(fault(), AllOf(HasSubstr("is computed again"), HasSubstr("in dK")));
  EXPECT_NE(harm(), "");
}

TEST_F(HandWrittenBackward, StatsBeforeTheyAreThere) {
  AttendBackward late = mine;
  late.stats = slot(0, owned(Kind::Stats, 0));
  EXPECT_EQ(with(late), "rank 0, step 0: reads Stats[heads 0, rows 0-1], which is not in its home");
}

TEST_F(HandWrittenBackward, SumsThatTakeTurnsUncleared) {
  const int home = at(0).slots[static_cast<std::size_t>(slot(0, owned(Kind::dK, 0)))].home;
  const SlotId second = slot(0, owned(Kind::dK, 0), home);
  AttendBackward again = mine;
  again.dk = second;
  EXPECT_THAT(with(again),
              HasSubstr("step 0: reads dK[heads 0, rows 0-1], which is not in its home"));
  add(0, Clear{second});
  EXPECT_THAT(with(again), Not(HasSubstr("not in its home")));
}

TEST_F(HandWrittenBackward, ClearedSumsAreLost) {
  swap_keys();
  add(0, Clear{mine.dq});
  EXPECT_THAT(fault(), HasSubstr("pair (h0, q0, k0) is computed 0 times in dQ of"));
  EXPECT_NE(harm(), "");
}

TEST_F(HandWrittenBackward, ClearsWhatIsBeingSent) {
  // The Clear must wait for the Send, which never meets a receive.
  add(0, Send{mine.dk, owned(Kind::dK, 0), 1});
  add(0, Clear{mine.dk});
  EXPECT_THAT(fault(), AllOf(HasSubstr("never meets its partner"), HasSubstr("stands at step 1")));
  EXPECT_EQ(harm(Weather::Late), "deadlock");
}

TEST_F(HandWrittenBackward, WrongKindsAndBlocks) {
  AttendBackward wrong = mine;
  std::swap(wrong.dk, wrong.dv);
  EXPECT_THAT(with(wrong), HasSubstr("goes back with dV[heads 0, rows 0-1] where dK is due"));
  wrong = mine;
  wrong.dk = slot(0, owned(Kind::dK, 1));
  EXPECT_THAT(with(wrong), HasSubstr("rows or heads that differ: K[heads 0, rows 0-1] beside dK"));
  wrong = mine;
  wrong.dq = -1;
  EXPECT_THAT(with(wrong), HasSubstr("there is no slot -1"));
  EXPECT_THAT(with(Add{mine.dk, mine.dv}), HasSubstr("adds dK"));
  EXPECT_THAT(with(Add{mine.dk, mine.dk}), HasSubstr("adds dK"));
  EXPECT_THAT(with(Add{mine.q, mine.q}), HasSubstr("adds Q"));
  EXPECT_THAT(with(Add{slot(0, owned(Kind::dK, 1)), mine.dk}),
              HasSubstr("adds dK[heads 0, rows 2-3] to"));
  EXPECT_THAT(with(Merge{mine.dk, mine.dk}), HasSubstr("merges dK"));
  EXPECT_THAT(with(Clear{mine.q}), HasSubstr("clears Q"));
  EXPECT_THAT(with(Reduce{mine.stats, 0}), HasSubstr("reduces Stats"));
  EXPECT_THAT(with(Reduce{mine.dq, 0}), HasSubstr("for ever"));
}

TEST_F(HandWrittenBackward, WrongInputsAndResults) {
  swap_keys();
  const Plan right = plan;
  at(1).inputs.pop_back();
  EXPECT_THAT(fault(), HasSubstr("rank 1, step 0: starts with 4 inputs where 5 are due"));
  plan = right;
  std::swap(at(1).inputs[3], at(1).inputs[4]);
  EXPECT_THAT(fault(), HasSubstr("Stats[heads 0, rows 2-3] as the input dO"));
  plan = right;
  at(1).results.pop_back();
  EXPECT_THAT(fault(), HasSubstr("does not deliver each result of a backward pass"));
  plan = right;
  at(0).results[1].block.rows = {{0, 1}};
  EXPECT_THAT(fault(), AllOf(HasSubstr("of dK, what all ranks deliver together"),
                             HasSubstr("row 1) is not there")));
  plan = right;
  at(0).pass = Pass::forward;
  EXPECT_THAT(fault(), StartsWith("rank 0, step "));
  plan = right;
  at(0).slots.push_back(
      {owned(Kind::dQ, 0), at(0).slots[static_cast<std::size_t>(mine.stats)].home});
  EXPECT_THAT(fault(), HasSubstr("shares its home with an input"));
}

TEST_F(HandWrittenBackward, PrintsAsText) {
  swap_keys();
  EXPECT_THAT(text(plan[1]), HasSubstr("back   Q[heads 0, rows 2-3]@0 dO[heads 0, rows 2-3]@3 "
                                       "Stats[heads 0, rows 2-3]@4 with K"));
  EXPECT_THAT(text(plan[1]), HasSubstr("add    dK[heads 0, rows 2-3]@"));
  EXPECT_THAT(text(plan[1]), HasSubstr("  delivers dV[heads 0, rows 2-3]\n"));
}

}  // namespace
}  // namespace dattn
