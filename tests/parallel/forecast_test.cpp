#include <gtest/gtest.h>

#include <stdexcept>

#include "parallel/rehearse.hpp"
#include "tests/cases.hpp"
#include "tests/sanitized.hpp"

namespace dattn {
namespace {

Rehearsal on(const Case& c, const Machine& machine) {
  const Problem problem = c.problem();
  return rehearse(problem, make_plan(c.how(), problem), machine);
}

const Shape kShape{4096, 4096, 8, 2, 2, 64, 64};

TEST(Forecast, OfOneRankIsItsKernelAndTheStep) {
  const Machine machine{1e-5, 1e9, 1e11, 1e-6};
  const Rehearsal found = on({kShape, "causal", "contiguous", "local", line(1)}, machine);
  const double pairs = 8.0 * 4096 * 4097 / 2;
  EXPECT_DOUBLE_EQ(found.forecast_seconds(), pairs * 256 / 1e11 + 1e-6);
  EXPECT_DOUBLE_EQ(found.compute_seconds[0], pairs * 256 / 1e11);
  EXPECT_EQ(found.wait_seconds[0], 0);
}

TEST(Forecast, OfOneRankBackwardIsFiveProductsAPair) {
  const Case c{kShape, "causal", "contiguous", "local", line(1)};
  const Problem problem = c.problem();
  const Plan plan = make_plan(c.how(), problem, Pass::backward);
  const double flops = 8.0 * 4096 * 4097 / 2 * (6 * 64 + 4 * 64);
  const Machine machine{1e-5, 1e9, 1e11, 1e-6};
  EXPECT_DOUBLE_EQ(rehearse(problem, plan, machine).forecast_seconds(), flops / 1e11 + 1e-6);
  const Machine slower = parse_machine("backward_rate=4e10", machine);
  EXPECT_DOUBLE_EQ(rehearse(problem, plan, slower).forecast_seconds(), flops / 4e10 + 1e-6);
}

// A row that sees a single key of a block still has its record read and written.
TEST(Forecast, CountsRowsThatKernelsReadAndWrite) {
  const Shape shape{4096, 4096, 8, 2, 2, 64, 64};
  const Problem problem(shape, parse_mask("window:0,0/sink:1", shape), line(2), "contiguous");
  const Plan plan = make_plan(*find_strategy("ring"), problem);
  const Machine free{.latency = 0, .bandwidth = 1e15, .rate = 1e15, .overhead = 0};
  const Machine costly = parse_machine("rows=1e9", free);
  // Rank 1: own keys, then, for each of its queries, the one key that all see and that comes.
  const double q = 2048.0 * 8 * (64 + 2 * 66) * 4;
  const double kv = 2048.0 * 2 * (64 + 64) * 4;
  const Rehearsal found = rehearse(problem, plan, costly);
  EXPECT_NEAR(found.compute_seconds[1], (2 * q + kv + kv / 2048) / 1e9, 1e-6);
  // Rank 0's queries see no key of rank 1.
  EXPECT_NEAR(found.compute_seconds[0], (q + kv) / 1e9, 1e-6);
  EXPECT_LT(rehearse(problem, plan, free).compute_seconds[1], 1e-6);
  EXPECT_EQ(parse_machine(costly.text()).rows, 1e9);
}

TEST(Forecast, CountsSumsThatAreClearedAndMergedBesideKernels) {
  const Machine machine{.latency = 0, .bandwidth = 1e15, .rate = 1e15, .overhead = 0, .rows = 1e9};
  const auto of = [&](const Case& c, Pass pass) {
    const Problem problem = c.problem();
    return rehearse(problem, make_plan(c.how(), problem, pass), machine);
  };
  // One rank: the kernel's rows, and zeros in dQ, dK and dV before.
  const double q = 4096.0 * 8 * (2 * 64 + 2 + 2 * 64) * 4;
  const double kv = 4096.0 * 2 * (64 + 64) * (1 + 2) * 4;
  const double zeros = 4096.0 * (8 * 64 + 2 * (64 + 64)) * 4;
  const Rehearsal one = of({kShape, "causal", "contiguous", "local", line(1)}, Pass::backward);
  EXPECT_NEAR(one.compute_seconds[0], (q + kv + zeros) / 1e9, 1e-4);
  EXPECT_NEAR(one.sum_seconds[0], zeros / 1e9, 1e-9);
  // Rank 2 of 3 attends to its own keys and rank 1's; rank 0 to those of its own for rank 2, whose
  // Partial is merged: read twice and written once.
  const Shape shape{3072, 3072, 4, 4, 4, 64, 64};
  const double rows = 1024.0 * 4 * (64 + 2 * 66 + 64 + 64) * 4;
  const double merged = 1024.0 * 4 * 66 * 4 * 3;
  const Rehearsal three = of({shape, "causal", "contiguous", "lightseq", line(3)}, Pass::forward);
  EXPECT_NEAR(three.compute_seconds[2], (2 * rows + merged) / 1e9, 1e-4);
  EXPECT_NEAR(three.sum_seconds[2], merged / 1e9, 1e-9);
}

TEST(Forecast, OfARingBackwardHidesTheWayHomeToo) {
  const Case one{kShape, "full", "contiguous", "local", line(1)};
  const Case two{kShape, "full", "contiguous", "ring", line(2)};
  const auto backward = [&](const Case& c, double bandwidth) {
    const Problem problem = c.problem();
    return rehearse(problem, make_plan(c.how(), problem, Pass::backward), {0, bandwidth, 1e10, 0})
        .forecast_seconds();
  };
  // Of the two equal steps of a rank the one on its own keys hides K and V, which come, with one
  // half and dK and dV, which go home, with the other: here each fills 0.7 of a half.
  const double all = backward(one, 1e10) / 2;
  const double bytes = 2048.0 * 2 * 128 * 4;
  EXPECT_NEAR(backward(two, bytes / (0.7 * all / 4)), all, 1e-9);
}

TEST(Forecast, OfARingHidesMessagesBehindKernels) {
  const Case one{kShape, "full", "contiguous", "local", line(1)};
  const Case two{kShape, "full", "contiguous", "ring", line(2)};
  const Machine fast{1e-6, 1e10, 1e10, 0};
  const Rehearsal found = on(two, fast);
  EXPECT_DOUBLE_EQ(found.forecast_seconds(), on(one, fast).forecast_seconds() / 2);
  EXPECT_EQ(found.wait_seconds[0], 0);
  // On a slow link the second half of the work waits for both messages, one behind the other.
  const Machine slow{1e-6, 1e4, 1e14, 0};
  const double bytes = 2048.0 * 2 * 128 * 4;
  const double half = on(one, slow).forecast_seconds() / 4;
  EXPECT_NEAR(on(two, slow).forecast_seconds(), 1e-6 + bytes / 1e4 + half, 1e-5);
  EXPECT_NEAR(on(two, slow).wait_seconds[1], 1e-6 + bytes / 1e4 - half, 1e-5);
}

TEST(Forecast, OfTreeIsItsKernelAndOneAllReduce) {
  const Shape shape{4, 4096, 8, 2, 2, 64, 64};
  const Machine machine{1e-3, 1e6, 1e11, 0};
  const Rehearsal found = on({shape, "full", "contiguous", "tree", line(4)}, machine);
  EXPECT_DOUBLE_EQ(found.forecast_seconds(),
                   4 * 8 * 1024 * 256 / 1e11 + 2 * 2 * 1e-3 + 1.5 * 4 * 8 * 66 * 4 / 1e6);
}

TEST(Forecast, IsProportionalToTheMachine) {
  for (const int ranks : {2, 5, 8}) {
    for (const Case& c : cases(ranks, 53)) {
      const Machine base{1e-6, 1e8, 1e9, 1e-7};
      const Rehearsal found = on(c, base);
      const Rehearsal slower = on(c, {8e-6, 1e8 / 8, 1e9 / 8, 8e-7});
      EXPECT_DOUBLE_EQ(slower.forecast_seconds(), 8 * found.forecast_seconds()) << c.text();
      for (std::size_t r = 0; r < found.seconds.size(); ++r) {
        EXPECT_LE(found.compute_seconds[r] + found.wait_seconds[r], found.seconds[r] * (1 + 1e-12))
            << c.text();
      }
    }
  }
}

TEST(Forecast, NeverFallsOnASlowerMachine) {
  // One worse figure may let messages of other plans find their links in a luckier order.
  for (const int ranks : {1, 2, 5, 8}) {
    for (const Case& c : cases(ranks, kSanitized ? 331 : 53)) {
      const bool one_order = c.strategy == "ring" || c.strategy == "tree" || c.strategy == "local";
      const Machine base{1e-6, 1e8, 1e9, 1e-7};
      const double least = on(c, base).forecast_seconds() * (one_order ? 1.0 : 0.5);
      for (double Machine::*worse : {&Machine::latency, &Machine::overhead}) {
        Machine machine = base;
        machine.*worse *= 7;
        EXPECT_GE(on(c, machine).forecast_seconds(), least) << c.text();
      }
      for (double Machine::*worse : {&Machine::bandwidth, &Machine::rate}) {
        Machine machine = base;
        machine.*worse /= 7;
        EXPECT_GE(on(c, machine).forecast_seconds(), least) << c.text();
      }
    }
  }
}

TEST(Forecast, PutsBalancedPartitionsFirst) {
  for (const int ranks : {4, 16}) {
    Case c{kShape, "causal", "contiguous", "ring", line(ranks)};
    const double contiguous = on(c, {}).forecast_seconds();
    c.partition = "zigzag";
    EXPECT_LT(on(c, {}).forecast_seconds(), 0.7 * contiguous);
  }
}

TEST(MachineWords, SetWhatTheyName) {
  const Machine machine = parse_machine("bandwidth=2e9,latency=0", {1, 2, 3, 4});
  EXPECT_EQ(machine.bandwidth, 2e9);
  EXPECT_EQ(machine.latency, 0);
  EXPECT_EQ(machine.rate, 3);
  EXPECT_EQ(machine.overhead, 4);
  EXPECT_EQ(parse_machine("").text(), Machine{}.text());
  const Machine backward = parse_machine("backward_rate=7");
  EXPECT_EQ(backward.backward(), 7);
  EXPECT_EQ(Machine{}.backward(), Machine{}.rate);
  EXPECT_EQ(parse_machine(backward.text()).backward_rate, 7);
  EXPECT_EQ(parse_machine(machine.text()).text(), machine.text());
}

TEST(MachineWords, ComplainInOneLine) {
  for (const char* words :
       {"speed=1",    "bandwidth",      "bandwidth=", "bandwidth=0",     "rate=0",
        "rate=-1",    "latency=-1",     "rate=nan",   "backward_rate=0", "rate=inf",
        "rate=1e999", "rate=1e-300",    "rate=1x",    "rate=1 ",         " rate=1",
        ",",          "rate=1,,rate=2", "=1",         "rate==1",         "rate=1=2"}) {
    try {
      parse_machine(words);
      ADD_FAILURE() << words;
    } catch (const std::invalid_argument& e) {
      EXPECT_NE(std::string(e.what()).find("latency=S, bandwidth=B"), std::string::npos);
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    }
  }
}

// A plan for many ranks is a matter of seconds, and its parts grow as they should.
TEST(Scale, RingOf1024Ranks) {
  if (kSanitized) GTEST_SKIP() << "a minute, and nothing new to sanitizers";
  const Shape shape{131072, 131072, 8, 2, 2, 64, 64};
  const Case c{shape, "causal", "zigzag", "ring", line(1024)};
  const Problem problem = c.problem();
  const Plan plan = make_plan(c.how(), problem);
  for (const Program& program : plan) {
    ASSERT_EQ(program.steps.size(), 4u * 1023 + 1024);
    ASSERT_EQ(program.homes, 8);
  }
  const Rehearsal found = rehearse(problem, plan);
  ASSERT_FALSE(found.fault) << found.fault->text();
  EXPECT_EQ(found.pairs_total(), 8 * (Index{131072} * 131073 / 2));
  EXPECT_EQ(found.messages, Index{2} * 1024 * 1023);
  EXPECT_EQ(found.bytes_sent[7], Index{1023} * 128 * 2 * 128 * 4);
}

}  // namespace
}  // namespace dattn
