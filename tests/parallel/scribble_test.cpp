// Two ranks of one host: somebody writes to memory that is lent, before the borrower looks at it or
// while it does.
#include <gtest/gtest.h>

#include "comm/digest.hpp"
#include "comm/windows.hpp"
#include "parallel/envelope.hpp"
#include "tests/mpi_main.hpp"
#include "tests/parallel/engine_cases.hpp"

namespace dattn::testing {
namespace {

/// Rank 0 changes a bit of its keys, which rank 1 looks at where they lie: before rank 1 takes its
/// first step, or before its last one. What rank 1 says of it.
std::string said_of_a_scribble(bool at_once, bool verify) {
  comm::Communicator& world = comm::world();
  world.set_deadline(20);
  comm::Windows windows(world, {});
  if (!windows.trouble().empty()) return windows.trouble();
  const Shape shape{24, 24, 2, 2, 2, 4, 4};
  const Problem problem(shape, parse_mask("causal", shape), line(2), "contiguous");
  Program program = find_strategy("gather")->program(problem, world.rank());
  // The last step once more, so that there is one in which the keys are being looked at.
  program.steps.push_back(program.steps.back());
  const std::size_t meeting = world.rank() == 1 && at_once ? 0 : program.steps.size() - 1;
  std::byte* key = nullptr;
  EngineOptions options{.verify_wire = verify};
  options.progress = [&](std::size_t step) {
    if (step != meeting) return;
    world.barrier();
    if (world.rank() == 0) *key ^= std::byte{1};
    world.barrier();
  };
  Engine<comm::Windows> engine(problem, program, windows, options);
  load(engine, problem, program, Tensors<float>(shape, 3));
  key = engine.input(program.input(Kind::K)).data();
  std::string said;
  try {
    const RunTimes times = engine.run();
    EXPECT_EQ(times.moved.viewed, times.bytes_sent);
    EXPECT_EQ(times.moved.copied, 0);
  } catch (const Corruption& e) {
    said = e.what();
    windows.give_back();  // rank 0 waits for it
  }
  return said;
}

TEST(Scribble, OnLentMemoryIsFound) {
  ASSERT_EQ(comm::world().size(), 2);
  if (!comm::has_digest()) GTEST_SKIP() << "this build has no xxHash";
  for (const bool at_once : {true, false}) {
    const std::string said = said_of_a_scribble(at_once, true);
    if (comm::world().rank() == 0) {
      EXPECT_EQ(said, "");
      continue;
    }
    EXPECT_NE(said.find("K[heads 0-1, rows 0-11] from rank 0"), std::string::npos) << said;
    EXPECT_NE(said.find(at_once ? ": it is corrupted" : ": while it was looked at"),
              std::string::npos)
        << said;
  }
}

TEST(Scribble, ElseNobodyWouldKnow) { EXPECT_EQ(said_of_a_scribble(true, false), ""); }

}  // namespace
}  // namespace dattn::testing
