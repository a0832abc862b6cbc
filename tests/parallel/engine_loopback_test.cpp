// The engine over threads: random delays, rendezvous and eager sends. Run under ThreadSanitizer
// too.
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "parallel/moves.hpp"
#include "tests/parallel/engine_cases.hpp"

namespace dattn::testing {
namespace {

struct Mode {
  const char* name;
  bool rendezvous;
  int delay;
};

/// One thread a rank; an exception in one fails the job, so that none hangs.
template <class Body>
void on_all_ranks(int ranks, const Mode& mode, std::uint64_t seed, const Body& body) {
  comm::Loopback job(
      ranks,
      {.seed = seed, .max_delay_polls = mode.delay, .rendezvous = mode.rendezvous, .deadline = 60});
  std::vector<std::string> errors(static_cast<std::size_t>(ranks));
  {
    std::vector<std::jthread> threads;
    for (int r = 0; r < ranks; ++r) {
      threads.emplace_back([&, r] {
        try {
          body(job.at(r));
        } catch (const std::exception& e) {
          errors[static_cast<std::size_t>(r)] = e.what();
          job.fail(e.what());
        }
      });
    }
  }
  for (const std::string& e : errors) EXPECT_EQ(e, "");
}

/// Every so-manyth shape of the table for each strategy, partition and mask.
constexpr std::size_t kEveryShape = 53;

class EngineOverLoopback : public ::testing::TestWithParam<Mode> {};

TEST_P(EngineOverLoopback, AgreesWithTheReference) {
  for (const int ranks : {1, 2, 3, 4, 5}) {
    for (const Case& c : cases(ranks, kEveryShape)) {
      std::vector<std::string> troubles(static_cast<std::size_t>(ranks));
      on_all_ranks(ranks, GetParam(), 11, [&](comm::Loopback::Endpoint& end) {
        // Threads share no sum; each rank's own rows must be within the bounds.
        const auto own = [](double x) { return x; };
        troubles[static_cast<std::size_t>(end.rank())] = trouble_with(c, end, true, own);
      });
      for (const std::string& trouble : troubles) ASSERT_EQ(trouble, "");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, EngineOverLoopback,
                         ::testing::Values(Mode{"eager", false, 0}, Mode{"delayed", false, 5},
                                           Mode{"rendezvous", true, 3}),
                         [](const auto& mode) { return mode.param.name; });

TEST(Engine, DoubleIsExactToDoubleRounding) {
  const Shape shape{59, 59, 6, 2, 3, 8, 5};
  const Tensors<double> tensors(shape, 9);
  for (const Strategy& strategy : strategies()) {
    const Problem problem(shape, parse_mask("causal", shape), strategy.mesh(3, shape), "striped",
                          Type::f8);
    if (strategy.refuses(problem)) continue;
    on_all_ranks(3, {"delayed", false, 2}, 5, [&](comm::Loopback::Endpoint& end) {
      const Outcome outcome = run_and_judge(problem, strategy, end, tensors, {.checked = true});
      EXPECT_LE(std::sqrt(outcome.error), 1e-14 * std::sqrt(outcome.reference)) << strategy.name;
      EXPECT_LE(outcome.lse_error, 1e-13) << strategy.name;
    });
  }
}

TEST(Engine, SaysWhichStepWaitedTooLong) {
  const Shape shape{16, 16, 2, 1, 1, 4, 4};
  const Problem problem(shape, parse_mask("full", shape), line(2), "contiguous");
  comm::Loopback job(2, {.rendezvous = true, .deadline = 0.05});
  const Program program = find_strategy("ring")->program(problem, 0);
  Engine<comm::Loopback::Endpoint> engine(problem, program, job.at(0), {});
  std::memset(engine.input(program.input(Kind::Q)).data(), 0,
              engine.input(program.input(Kind::Q)).size());
  std::memset(engine.input(program.input(Kind::K)).data(), 0,
              engine.input(program.input(Kind::K)).size());
  std::memset(engine.input(program.input(Kind::V)).data(), 0,
              engine.input(program.input(Kind::V)).size());
  try {
    engine.run();  // rank 1 never comes
    FAIL();
  } catch (const StepFailure& e) {
    EXPECT_TRUE(e.timed_out);
    EXPECT_NE(std::string(e.what()).find("step 0 (recv"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("1"), std::string::npos) << e.what();
  }
}

TEST(Engine, UsesTheCallersMemory) {
  const Shape shape{5, 5, 1, 1, 1, 2, 1};
  const Problem problem(shape, parse_mask("full", shape), line(1), "contiguous");
  const Program program = find_strategy("local")->program(problem, 0);
  comm::Loopback job(1);
  Engine<comm::Loopback::Endpoint> engine(problem, program, job.at(0), {});
  const std::vector<float> q(10, 0.0F);  // all scores equal: O is the mean of V
  const std::vector<float> k(10, 1.0F);
  const std::vector<float> v{1, 2, 3, 4, 5};
  engine.bind(program.input(Kind::Q), std::as_bytes(std::span(q)));
  engine.bind(program.input(Kind::K), std::as_bytes(std::span(k)));
  engine.bind(program.input(Kind::V), std::as_bytes(std::span(v)));
  engine.run();
  std::vector<float> o(5);
  std::vector<float> lse(5);
  engine.result(std::span(o), std::span(lse));
  EXPECT_FLOAT_EQ(o[3], 3.0F);
  EXPECT_FLOAT_EQ(lse[0], std::log(5.0F));
}

}  // namespace
}  // namespace dattn::testing
