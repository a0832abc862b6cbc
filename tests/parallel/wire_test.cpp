// Rounding of sums on their way to a message and back.
#include "parallel/wire.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace dattn {
namespace {

/// Both ways, as other ranks see it.
std::vector<float> there_and_back(std::vector<float> numbers, const RoundedRecord& record) {
  const auto count = static_cast<Index>(numbers.size());
  const comm::Strips all = comm::strips_of(std::as_writable_bytes(std::span(numbers)));
  const Index kept = count / record.numbers * record.kept;
  std::vector<std::byte> message(static_cast<std::size_t>(2 * (count + kept)));
  round(comm::read_only(all), record, message.data(), [] {});
  std::fill(numbers.begin(), numbers.end(), -1.0F);
  widen(message.data(), record, all, [] {});
  return numbers;
}

TEST(Wire, RoundsToNearestAndTiesToEven) {
  EXPECT_EQ(there_and_back({1.0F, 1 + 0x1p-8F, 1 + 3 * 0x1p-8F, 1 + 0x1.02p-8F, -0x1p-149F, -0.0F},
                           {6, 0}),
            (std::vector<float>{1.0F, 1.0F, 1 + 0x1p-6F, 1 + 0x1p-7F, -0.0F, -0.0F}));
  const auto odd = there_and_back(
      {std::numeric_limits<float>::infinity(), std::bit_cast<float>(0x7f800001U), 3e38F}, {3, 0});
  EXPECT_EQ(odd[0], std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(odd[1]));
  EXPECT_NEAR(odd[2], 3e38F, 0x1p-8F * 3e38F);
}

TEST(Wire, LeavesTheFirstNumbersOfARecord) {
  // No key, and a key whose score and weight bfloat16 does not have.
  const float none = -std::numeric_limits<float>::infinity();
  const std::vector<float> records{none, 0, 0, 0, 0.1F, 1.0001F, 0.1F, 1.0001F};
  const std::vector<float> back = there_and_back(records, {4, 2});
  EXPECT_EQ(back, (std::vector<float>{none, 0, 0, 0, 0.1F, 1.0001F, 0x1.9ap-4F, 1.0F}));
}

TEST(Wire, TakesStripsInOrderAndTouchesNothingElse) {
  // Rows of 7 records of 3 numbers, of which two pieces are sent: records 1 to 4, and 2 to 3.
  constexpr Index kRow = 7 * 3;
  std::vector<float> from(static_cast<std::size_t>(9 * kRow));
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i % 251);
  std::vector<float> into(from.size(), -1);
  const auto strips = [&](std::vector<float>& rows) {
    auto* data = reinterpret_cast<std::byte*>(rows.data());
    return comm::Strips{{data + 1 * 12, 4, 4 * 12, kRow * 4},
                        {data + (5 * kRow + 6) * 4, 3, 2 * 12, kRow * 4}};
  };
  constexpr Index kRecords = 4 * 4 + 3 * 2;
  for (const Index kept : {0, 2}) {
    std::vector<std::byte> message(static_cast<std::size_t>(kRecords * 2 * (3 + kept)) + 1,
                                   std::byte{0x5a});
    int polls = 0;
    round(comm::read_only(strips(from)), {3, kept}, message.data(), [&] { ++polls; });
    EXPECT_EQ(message.back(), std::byte{0x5a});
    std::fill(into.begin(), into.end(), -1.0F);
    widen(message.data(), {3, kept}, strips(into), [&] { ++polls; });
    EXPECT_EQ(polls, 0);  // that is short work
    for (std::size_t i = 0; i < from.size(); ++i) {
      const auto row = static_cast<Index>(i) / kRow;
      const Index record = static_cast<Index>(i) % kRow / 3;
      const bool sent =
          row < 4 ? record >= 1 && record < 5 : row >= 5 && row < 8 && record >= 2 && record < 4;
      EXPECT_EQ(into[i], sent ? from[i] : -1) << i;  // small whole numbers do not round
    }
  }
}

TEST(Wire, PollsWhileWorkIsLong) {
  std::vector<float> numbers(1 << 20, 1.0F);
  std::vector<std::byte> message(numbers.size() * 2);
  auto* data = reinterpret_cast<std::byte*>(numbers.data());
  const comm::Strips rows{{data, 1 << 10, 1 << 12, 1 << 12}};
  int polls = 0;
  round(comm::read_only(rows), {64, 0}, message.data(), [&] { ++polls; });
  EXPECT_GE(polls, 8);
  polls = 0;
  widen(message.data(), {64, 0}, rows, [&] { ++polls; });
  EXPECT_GE(polls, 8);
}

}  // namespace
}  // namespace dattn
