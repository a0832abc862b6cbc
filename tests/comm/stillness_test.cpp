#include "comm/stillness.hpp"

#include <gtest/gtest.h>

namespace dattn::comm {
namespace {

using Duty = Stillness::Duty;
using Sight = Stillness::Sight;

TEST(StillnessTest, EndsWhenNothingHasMovedForLonger) {
  Stillness still;
  const Sight waiting{.moves = 4, .waits = true};
  EXPECT_EQ(still.look(waiting, 1, 2), Duty::none);  // since the look before it has moved
  EXPECT_EQ(still.look(waiting, 1, 2), Duty::none);
  EXPECT_EQ(still.look(waiting, 1, 2), Duty::none);
  EXPECT_EQ(still.seconds(), 2);
  EXPECT_EQ(still.look(waiting, 0.5, 2), Duty::end);
  EXPECT_EQ(still.moves(), 1);
}

TEST(StillnessTest, WithoutALimitNobodyGivesUp) {
  Stillness still;
  const Sight waiting{.waits = true, .silent = {1}};
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(still.look(waiting, 1e6, 0), Duty::none);
  EXPECT_EQ(still.look({.waits = true, .heard = Alarm::stuck}, 1, 0), Duty::end) << "but when told";
}

TEST(StillnessTest, ARankMovesWhenSomethingHappens) {
  Stillness still;
  for (std::int64_t i = 1; i <= 10; ++i) {
    EXPECT_EQ(still.look({.moves = i, .waits = true}, 10, 2), Duty::none);
    EXPECT_EQ(still.seconds(), 0);
    EXPECT_EQ(still.moves(), i);
  }
}

TEST(StillnessTest, WorkIsUseOfTheProcessorByARankThatDoesNotWait) {
  Stillness still;
  double used = 0;
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(still.look({.processor = used += 0.01}, 1, 2), Duty::none);
  }
  EXPECT_EQ(still.moves(), 10);
  // A rank that polls for a message uses it, too.
  EXPECT_EQ(still.look({.waits = true, .processor = used += 1}, 1, 2), Duty::none);
  EXPECT_EQ(still.look({.waits = true, .processor = used += 1}, 1, 2), Duty::none);
  EXPECT_EQ(still.look({.waits = true, .processor = used += 1}, 1, 2), Duty::end);
  // One that hangs in a file system does not, but for what its other threads need.
  Stillness hangs;
  EXPECT_EQ(hangs.look({.processor = 0.001}, 1, 2), Duty::none);
  EXPECT_EQ(hangs.look({.processor = 0.002}, 1, 2), Duty::none);
  EXPECT_EQ(hangs.look({.processor = 0.003}, 1, 2), Duty::end);
}

TEST(StillnessTest, WaitsAsLongAsAnyOtherMoves) {
  Stillness still;
  for (std::int64_t i = 1; i <= 10; ++i) {
    EXPECT_EQ(still.look({.waits = true, .others = i}, 1.5, 2), Duty::none);
  }
  EXPECT_EQ(still.moves(), 0) << "that others move is not passed on as a move of this rank";
  EXPECT_EQ(still.look({.waits = true, .others = 10}, 1.5, 2), Duty::none);
  EXPECT_EQ(still.look({.waits = true, .others = 10}, 1.5, 2), Duty::end);
}

TEST(StillnessTest, WhoIsHeardNoMoreEndsTheJobHoweverBusyItIs) {
  Stillness still;
  EXPECT_EQ(still.look({.moves = 1, .others = 1}, 1, 2), Duty::none);
  EXPECT_EQ(still.look({.moves = 2, .others = 2, .silent = {3}}, 1, 2), Duty::end);
}

TEST(StillnessTest, WhatOthersTell) {
  Stillness still;
  EXPECT_EQ(still.look({.moves = 1, .heard = Alarm::stuck}, 1, 2), Duty::end);
  EXPECT_EQ(still.look({.moves = 2, .heard = Alarm::failed}, 1, 2), Duty::write_down);
  EXPECT_EQ(still.look({.moves = 3, .own = Alarm::failed, .heard = Alarm::failed}, 1, 2),
            Duty::none)
      << "it has written down what failed";
  EXPECT_EQ(still.look({.moves = 4, .own = Alarm::failed, .heard = Alarm::stuck}, 1, 2), Duty::end);
}

}  // namespace
}  // namespace dattn::comm
