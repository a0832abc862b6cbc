// What goes beside messages: each says which Block it is, and what its bytes are.
#include "parallel/envelope.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <span>

#include "comm/digest.hpp"
#include "parallel/flights.hpp"
#include "parallel/needs.hpp"
#include "parallel/sealed.hpp"
#include "tests/loopback_ranks.hpp"
#include "tests/parallel/engine_cases.hpp"

namespace dattn::testing {
namespace {

using comm::Loopback;

const Shape kShape{24, 24, 2, 2, 2, 4, 4};  // blocks of K and V have the same bytes

Problem ring_of(int ranks) {
  return Problem(kShape, parse_mask("full", kShape), line(ranks), "contiguous");
}

/// What each rank of `problem` has thrown, where rank 0 has the program that `change` leaves.
template <class Change>
std::vector<std::string> errors(const Problem& problem, const EngineOptions& options,
                                const Change& change) {
  Loopback job(problem.ranks(), {.rendezvous = true, .deadline = 20});
  return errors_on_ranks(job, problem.ranks(), [&](Loopback::Endpoint& end) {
    Program program = find_strategy("ring")->program(problem, end.rank());
    if (end.rank() == 0) change(program);
    Engine<Loopback::Endpoint> engine(problem, program, end, options);
    load(engine, problem, program, Tensors<float>(kShape, 3));
    engine.run();
  });
}

void swap_sends(Program& program) {
  std::vector<Send*> sends;
  for (Step& step : program.steps) {
    if (auto* send = std::get_if<Send>(&step)) sends.push_back(send);
  }
  ASSERT_GE(sends.size(), 2U);
  std::swap(*sends[0], *sends[1]);
}

TEST(Envelopes, SayWhichBlockTheyAreWhereBuildsAreChecked) {
  const std::vector<std::string> got = errors(ring_of(2), {.checked = true}, swap_sends);
  EXPECT_NE(
      got[1].find("rank 0 sent V[heads 0-1, rows 0-11] (message 0 of forward run 1, its step"),
      std::string::npos)
      << got[1];
  EXPECT_NE(got[1].find("where K[heads 0-1, rows 0-11] (message 0 of forward run 1) of rank 0 was "
                        "due"),
            std::string::npos)
      << got[1];
}

TEST(Envelopes, ElseNobodyWouldKnow) {
  for (const std::string& error : errors(ring_of(2), {}, swap_sends)) EXPECT_EQ(error, "");
}

TEST(Envelopes, FindABitThatChangesOnTheWay) {
  if (!comm::has_digest()) GTEST_SKIP() << "this build has no xxHash";
  for (const int ranks : {2, 3}) {
    const Problem problem = ring_of(ranks);
    Loopback job(ranks, {.rendezvous = true, .deadline = 20});
    std::atomic<bool> changed = false;
    const auto got = errors_on_ranks(job, ranks, [&](Loopback::Endpoint& end) {
      const Program program = find_strategy("ring")->program(problem, end.rank());
      std::byte* key = nullptr;
      EngineOptions options{.verify_wire = true};
      options.progress = [&](std::size_t step) {
        const bool posted = std::holds_alternative<Attend>(program.steps[step]);
        if (end.rank() == 0 && posted && !changed) {  // what it has said of its keys has left
          *key ^= std::byte{1};
          changed = true;
          changed.notify_all();
        }
        if (end.rank() == 1) changed.wait(false);
      };
      Engine<Loopback::Endpoint> engine(problem, program, end, options);
      load(engine, problem, program, Tensors<float>(kShape, 3));
      key = engine.input(program.input(Kind::K)).data();
      try {
        engine.run();
      } catch (const Corruption& e) {
        EXPECT_FALSE(e.timed_out);
        throw std::runtime_error(std::string("corruption: ") + e.what());
      }
    });
    EXPECT_EQ(got[1].find("corruption: step "), 0U) << got[1];
    EXPECT_NE(got[1].find("K[heads 0-1, rows 0-" + std::to_string(24 / ranks - 1) +
                          "] from rank 0 (its step "),
              std::string::npos)
        << got[1];
    EXPECT_NE(got[1].find("it is corrupted, XXH3-64 "), std::string::npos) << got[1];
  }
}

/// A block goes from rank 0 to 1, and on to 2. In between a bit of it changes in memory of rank 1.
TEST(Envelopes, FindABitThatChangesWhereABlockIsPassedOn) {
  if (!comm::has_digest()) GTEST_SKIP() << "this build has no xxHash";
  const Problem problem = ring_of(3);
  const Program ring = find_strategy("ring")->program(problem, 0);
  const Block block = ring.slots[static_cast<std::size_t>(ring.input(Kind::K))].block;
  Loopback job(3, {.deadline = 20});
  const auto got = errors_on_ranks(job, 3, [&](Loopback::Endpoint& end) {
    Program program;
    program.rank = end.rank();
    program.slots = {{block, 0}};
    program.homes = 1;
    if (end.rank() == 0) program.inputs = {0};
    if (end.rank() > 0) program.steps.push_back(Recv{0, block, end.rank() - 1});
    if (end.rank() < 2) program.steps.push_back(Send{0, block, end.rank() + 1});
    Homes homes(problem, program, [](int, Index bytes) { return comm::allocate(bytes); });
    if (end.rank() == 0) std::ranges::fill(homes.input(0), std::byte{5});
    Course course;
    course.start = Course::Clock::now();
    course.times.steps.resize(program.steps.size());
    Flights<Loopback::Endpoint> flights(problem, program, end, homes, course,
                                        {.verify_wire = true});
    flights.start();
    for (const Step& step : program.steps) {
      course.step = static_cast<int>(&step - program.steps.data());
      if (const auto* send = std::get_if<Send>(&step)) flights.post(*send);
      if (const auto* recv = std::get_if<Recv>(&step)) flights.post(*recv);
      flights.before_reading(0);
      if (end.rank() == 1) *homes.own_memory(0) = std::byte{4};
    }
    flights.land_all();
    flights.finish();
  });
  EXPECT_NE(got[2].find("from rank 1 (its step 1) is not what was sent: it is corrupted"),
            std::string::npos)
      << got[2];
}

/// Rank 1, which is rank 7 of its job, sends; its bytes change before rank 0 (rank 4) takes them.
TEST(SealedMessages, FindABitThatChangesOnTheWay) {
  if (!comm::has_digest()) GTEST_SKIP() << "this build has no xxHash";
  for (const bool verify : {true, false}) {
    Loopback job(2, {.rendezvous = true, .deadline = 20});
    std::atomic<bool> changed = false;
    const auto got = errors_on_ranks(job, 2, [&](Loopback::Endpoint& end) {
      std::vector<std::byte> bytes(100, std::byte{7});
      SealedMessages<Loopback::Endpoint> messages(end, "means", verify, {4, 7});
      if (end.rank() == 1) {
        messages.send(comm::strips_of(std::as_bytes(std::span(bytes))), 0);
        bytes[99] ^= std::byte{1};
        changed = true;
        changed.notify_all();
        EXPECT_EQ(messages.envelopes(), verify ? 1 : 0);
      } else {
        changed.wait(false);
        messages.recv(comm::strips_of(std::span(bytes)), 1);
      }
      messages.wait();
    });
    if (!verify) {
      EXPECT_EQ(got[0], "");
      continue;
    }
    EXPECT_EQ(got[0].find("means from rank 7 is not what was sent: it is corrupted, XXH3-64 "), 0U)
        << got[0];
  }
}

TEST(SealedMessages, SayWhatTheyAre) {
  if (!comm::has_digest()) GTEST_SKIP() << "this build has no xxHash";
  Loopback job(2, {.deadline = 20});
  const auto got = errors_on_ranks(job, 2, [&](Loopback::Endpoint& end) {
    std::vector<std::byte> bytes(8);
    SealedMessages<Loopback::Endpoint> messages(end, end.rank() == 1 ? "means" : "queries", true);
    if (end.rank() == 1) messages.send(comm::strips_of(std::as_bytes(std::span(bytes))), 0);
    if (end.rank() == 0) messages.recv(comm::strips_of(std::span(bytes)), 1);
    messages.wait();
  });
  EXPECT_EQ(got[0], "rank 1 sent means (8 bytes) where queries from rank 1 (8 bytes) was due");
}

TEST(Envelopes, TakeTheMemoryThatIsCounted) {
  const Problem problem = ring_of(3);
  const Program program = find_strategy("ring")->program(problem, 1);
  EXPECT_EQ(Envelopes(program, false).bytes(), envelope_bytes(program));
  const Needs without = needs_of(problem, program, nullptr);
  const Needs with = needs_of(problem, program, nullptr, {.verifies = true});
  EXPECT_EQ(without[Use::envelopes], 0);
  EXPECT_EQ(with[Use::envelopes], envelope_bytes(program));
  // An all-reduce on one host is by messages then: a third of the records from two others each, and
  // two messages to and from each.
  const Problem reduced(kShape, parse_mask("full", kShape), line(3), "contiguous");
  const Program tree = find_strategy("tree")->program(reduced, 1);
  const Index record = 6 * static_cast<Index>(sizeof(float));  // m, l, O
  EXPECT_EQ(needs_of(reduced, tree, nullptr, {.verifies = true})[Use::envelopes],
            envelope_bytes(tree) + 2 * 16 * record + 4 * kEnvelopeBytes);
}

TEST(Envelopes, FindResultsOfAnAllReduceThatDiffer) {
  if (!comm::has_digest()) GTEST_SKIP() << "this build has no xxHash";
  for (const int odd : {-1, 0, 2, 4}) {
    constexpr int kRanks = 5;
    Loopback job(kRanks, {.deadline = 20});
    const auto got = errors_on_ranks(job, kRanks, [&](Loopback::Endpoint& end) {
      std::vector<std::byte> bytes(100, std::byte{7});
      if (end.rank() == odd) bytes[50] = std::byte{6};
      try {
        require_same_bytes(end, end.rank(), bytes);
        EXPECT_EQ(odd, -1);
      } catch (const Corruption& e) {
        // The first that has not what rank 0 has.
        const std::string told =
            " on rank " + std::to_string(odd == 0 ? 1 : odd) + " where rank 0 has ";
        EXPECT_NE(std::string(e.what()).find(told), std::string::npos) << e.what();
        EXPECT_NE(odd, -1);
      }
    });
    for (const std::string& error : got) EXPECT_EQ(error, "");
  }
}

TEST(Envelopes, AreCountedApart) {
  const Problem problem = ring_of(3);
  Loopback job(3, {.deadline = 20});
  const auto got = errors_on_ranks(job, 3, [&](Loopback::Endpoint& end) {
    const Program program = find_strategy("ring")->program(problem, end.rank());
    RunTimes times[2];
    for (const bool checked : {false, true}) {
      Engine<Loopback::Endpoint> engine(problem, program, end, {.checked = checked});
      load(engine, problem, program, Tensors<float>(kShape, 3));
      times[checked] = engine.run();
    }
    EXPECT_EQ(times[0].envelopes, 0);
    EXPECT_EQ(times[1].envelopes, times[1].messages);
    EXPECT_EQ(times[0].messages, times[1].messages);
    EXPECT_EQ(times[0].bytes_sent, times[1].bytes_sent);
  });
  for (const std::string& error : got) EXPECT_EQ(error, "");
}

}  // namespace
}  // namespace dattn::testing
