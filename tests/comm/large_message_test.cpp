// A message longer than INT_MAX bytes, and the exact place of every word of it.

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>

#include "tests/mpi_main.hpp"

namespace dattn::comm {
namespace {

// Pieces of a prime number of words with a gap behind each; the sender reads the same few of them
// again and again, so that only the receiver needs the whole 2.2 GB.
constexpr std::int64_t kWord = sizeof(std::uint64_t);
constexpr std::int64_t kPieceWords = 131071;
constexpr std::int64_t kStrideWords = kPieceWords + 8;
constexpr std::int64_t kPieces = 30;
constexpr std::int64_t kRounds = 70;
constexpr std::int64_t kPeriod = kPieces * kPieceWords;
constexpr std::int64_t kBytes = kRounds * kPeriod * kWord;
static_assert(kBytes > std::numeric_limits<std::int32_t>::max());

std::uint64_t word(std::int64_t index) {
  return static_cast<std::uint64_t>(index) * 0x9e3779b97f4a7c15U;
}

std::unique_ptr<std::uint64_t[]> words(std::int64_t count) {
  return std::make_unique_for_overwrite<std::uint64_t[]>(static_cast<std::size_t>(count));
}

TEST(LargeMessage, BeyondIntMax) {
  // In few pieces, so that counts and displacements come as near to INT_MAX as they may.
  world().set_options({.piece = std::int64_t{1} << 30, .deadline = 100});
  if (world().rank() == 0) {
    const auto data = words(kPieces * kStrideWords);
    for (std::int64_t i = 0; i < kPeriod; ++i) {
      data.get()[i / kPieceWords * kStrideWords + i % kPieceWords] = word(i);
    }
    auto* bytes = reinterpret_cast<std::byte*>(data.get());
    const ConstStrips strips(kRounds, {bytes, kPieces, kPieceWords * kWord, kStrideWords * kWord});
    ASSERT_EQ(total(strips), kBytes);
    world().send(strips, 1).wait();
  } else {
    const auto data = words(kRounds * kPeriod);
    world().recv({{reinterpret_cast<std::byte*>(data.get()), 1, kBytes, kBytes}}, 0).wait();
    std::int64_t wrong = 0;
    for (std::int64_t round = 0; round < kRounds; ++round) {
      const std::uint64_t* at = data.get() + round * kPeriod;
      for (std::int64_t i = 0; i < kPeriod; ++i) wrong += at[i] != word(i) ? 1 : 0;
    }
    EXPECT_EQ(wrong, 0);
  }
}

}  // namespace
}  // namespace dattn::comm
