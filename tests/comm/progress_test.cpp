#include "comm/progress.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <utility>

namespace dattn::comm {
namespace {

using Event = Progress::Event;
using Kind = Progress::Kind;

TEST(ProgressTest, SaysWhatHappenedInOrder) {
  Progress progress;
  progress.phase("forward pass");
  progress.program({"attend", "send"});
  progress.step(1);
  progress.wait("receive", 2, 24);
  progress.moved_on();
  progress.wait("barrier", -1, 0, 7);
  const std::vector<Event> events = progress.events();
  ASSERT_EQ(events.size(), 4U);
  EXPECT_EQ(events[0].kind, Kind::phase);
  EXPECT_EQ(events[0].step, -1);
  EXPECT_EQ(events[1].kind, Kind::step);
  EXPECT_EQ(events[1].what, "send");
  EXPECT_EQ(events[1].step, 1);
  EXPECT_EQ(events[2].kind, Kind::wait);
  EXPECT_EQ(events[2].what, "receive");
  EXPECT_EQ(events[2].peer, 2);
  EXPECT_EQ(events[2].bytes, 24);
  EXPECT_EQ(events[2].sequence, -1);
  EXPECT_GE(events[2].end, events[2].begin);
  EXPECT_EQ(events[3].peer, -1);
  EXPECT_EQ(events[3].sequence, 7);
  EXPECT_LT(events[3].end, 0) << "it lasts";
  for (const Event& event : events) EXPECT_EQ(event.phase, "forward pass");
  for (std::size_t i = 1; i < 4; ++i) EXPECT_GE(events[i].begin, events[i - 1].begin);
}

TEST(ProgressTest, MovesWithEveryEventAndEveryPiece) {
  Progress progress;
  std::int64_t before = progress.moves();
  const auto grows = [&] { return progress.moves() > std::exchange(before, progress.moves()); };
  progress.phase("output");
  EXPECT_TRUE(grows());
  progress.step(0);
  EXPECT_TRUE(grows());
  EXPECT_FALSE(progress.waits());
  {
    const Waiting waiting(&progress, "send", 1, 8);
    EXPECT_TRUE(grows());
    EXPECT_TRUE(progress.waits());
    EXPECT_FALSE(grows());
    progress.moved();
    EXPECT_TRUE(grows());
    EXPECT_TRUE(progress.waits()) << "a piece has come, and the rank waits for the next";
  }
  EXPECT_TRUE(grows());
  EXPECT_FALSE(progress.waits());
  const Waiting nobody(nullptr, "send", 1, 8);  // where nobody watches
}

TEST(ProgressTest, KeepsTheLastEventsOnly) {
  Progress progress;
  for (std::size_t i = 0; i < Progress::kKept + 5; ++i) progress.step(i);
  const std::vector<Event> events = progress.events();
  ASSERT_EQ(events.size(), Progress::kKept);
  EXPECT_EQ(events.front().step, 5);
  EXPECT_EQ(events.back().step, static_cast<int>(Progress::kKept) + 4);
}

TEST(ProgressTest, AStepHasTheTextOfItsOwnProgram) {
  Progress progress;
  progress.program({"first"});
  progress.step(0);
  progress.program({"second"});
  progress.step(0);
  progress.step(1);  // beyond the program
  std::vector<Event> events = progress.events();
  EXPECT_EQ(events[0].what, "first");
  EXPECT_EQ(events[1].what, "second");
  EXPECT_EQ(events[2].what, "");
  for (int i = 0; i < 20; ++i) progress.program({"later"});  // texts of so many are not kept
  events = progress.events();
  EXPECT_EQ(events[0].what, "");
  EXPECT_EQ(events[0].step, 0);
}

TEST(ProgressTest, APhaseAndAProgramBeginWithoutAStep) {
  Progress progress;
  progress.program({"a"});
  progress.step(0);
  progress.wait("send", 1, 8);
  EXPECT_EQ(progress.events().back().step, 0);
  progress.moved_on();
  progress.phase("output");
  EXPECT_EQ(progress.events().back().step, -1);
  progress.step(0);
  progress.program({"b"});
  progress.wait("send", 1, 8);
  EXPECT_EQ(progress.events().back().step, -1);
}

}  // namespace
}  // namespace dattn::comm
