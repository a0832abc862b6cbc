#include "comm/strip.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <stdexcept>

namespace dattn::comm {
namespace {

/// Every byte of the strips, by address.
std::vector<std::byte*> addresses(const Strips& strips) {
  std::vector<std::byte*> out;
  for (const Strip& strip : strips) {
    for (std::int64_t i = 0; i < strip.count; ++i) {
      for (std::int64_t j = 0; j < strip.length; ++j) {
        out.push_back(strip.data + i * strip.stride + j);
      }
    }
  }
  return out;
}

struct StripTest : testing::Test {
  std::vector<std::byte> memory = std::vector<std::byte>(200);
  std::byte* at(std::int64_t i) { return memory.data() + i; }

  // Strided, empty in three ways, neighbours, contiguous though said strided, one byte wide,
  // backwards in memory.
  Strips sample() {
    return {{at(100), 3, 5, 8}, {nullptr, 0, 5, 8}, {at(130), 4, 0, 8}, {at(140), 1, 6, 99},
            {at(146), 1, 4, 4}, {at(150), 2, 5, 5}, {at(0), 7, 1, 3},   {at(40), 2, 9, 20}};
  }
};

TEST_F(StripTest, TotalCountsBytes) {
  EXPECT_EQ(total(sample()), 15 + 6 + 4 + 10 + 7 + 18);
  EXPECT_EQ(total(Strips{}), 0);
  EXPECT_EQ(total(ConstStrips{}), 0);
}

TEST_F(StripTest, CutIsTheSameStreamAtEveryPairOfOffsets) {
  const std::vector<std::byte*> all = addresses(sample());
  for (std::size_t begin = 0; begin <= all.size(); ++begin) {
    for (std::size_t end = begin; end <= all.size(); ++end) {
      const std::vector<std::byte*> expected(all.data() + begin, all.data() + end);
      const Strips cut_strips =
          cut(sample(), static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end));
      ASSERT_EQ(addresses(cut_strips), expected) << begin << " " << end;
      for (const Strip& strip : cut_strips) {
        ASSERT_GT(strip.count, 0);
        ASSERT_GT(strip.length, 0);
        ASSERT_TRUE(strip.count == 1 || strip.stride > strip.length);
      }
    }
  }
}

TEST_F(StripTest, CutJoinsWhatIsContiguous) {
  const Strips joined =
      cut(Strips{{at(140), 1, 6, 99}, {at(146), 1, 4, 4}, {at(150), 2, 5, 5}}, 0, 20);
  ASSERT_EQ(joined.size(), 1U);
  EXPECT_EQ(joined[0].data, at(140));
  EXPECT_EQ(joined[0].count, 1);
  EXPECT_EQ(joined[0].length, 20);
}

TEST_F(StripTest, PackAndUnpackMoveEveryByteOnce) {
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<std::byte>(i);
  std::vector<std::byte> packed(static_cast<std::size_t>(total(sample())));
  pack(read_only(sample()), packed);
  const std::vector<std::byte*> all = addresses(sample());
  for (std::size_t i = 0; i < all.size(); ++i) ASSERT_EQ(packed[i], *all[i]) << i;

  const std::vector<std::byte> before = memory;
  for (std::byte* byte : all) *byte = std::byte{0xff};
  unpack(packed, sample());
  EXPECT_EQ(memory, before);
}

TEST_F(StripTest, CopyMovesEveryByteHoweverBothAreCut) {
  std::vector<std::byte> source(static_cast<std::size_t>(total(sample())));
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i + 1);
  for (const std::int64_t piece : {1, 2, 3, 7, 1000}) {
    // The same bytes, in pieces with gaps and with an empty strip between.
    std::vector<std::byte> gaps(2 * source.size());
    ConstStrips from;
    std::size_t at = 0;
    for (std::int64_t done = 0; done < std::ssize(source);) {
      const std::int64_t next = std::min(piece, std::ssize(source) - done);
      std::copy_n(source.begin() + done, next, gaps.begin() + static_cast<std::ptrdiff_t>(at));
      from.push_back({gaps.data() + at, 1, next, 0});
      from.push_back({});
      done += next;
      at += static_cast<std::size_t>(next) + 1;
    }
    for (std::byte* byte : addresses(sample())) *byte = std::byte{0};
    copy(from, sample());
    std::vector<std::byte> got(source.size());
    pack(read_only(sample()), got);
    EXPECT_EQ(got, source) << piece;
  }
  EXPECT_THROW(copy({}, sample()), std::invalid_argument);
}

TEST_F(StripTest, ThreadsThatCopyChangeNoByte) {
  constexpr std::size_t kBytes = (std::size_t{3} << 20) + 5;
  std::vector<std::byte> source(kBytes);
  for (std::size_t i = 0; i < kBytes; ++i) source[i] = static_cast<std::byte>(i * 7 + i / 251);
  const ConstStrips from{
      {source.data(), 1000, 1000, 1000},
      {source.data() + 1000000, 1, static_cast<std::int64_t>(kBytes) - 1000000, 0}};
  for (const int threads : {1, 2, 3, 8}) {
    std::vector<std::byte> got(2 * kBytes);
    const std::int64_t rows = static_cast<std::int64_t>(kBytes) / 613;
    const std::int64_t rest = static_cast<std::int64_t>(kBytes) - rows * 613;
    const Strips into{{got.data(), rows, 613, 700}, {got.data() + rows * 700, 1, rest, 0}};
    copy(from, into, threads);
    std::vector<std::byte> packed(kBytes);
    pack(read_only(into), packed);
    EXPECT_TRUE(packed == source) << threads;
    for (std::int64_t row = 0; row < rows; ++row) {  // gaps stay
      ASSERT_EQ(got[static_cast<std::size_t>(row * 700 + 613)], std::byte{0}) << threads;
    }
  }
}

TEST_F(StripTest, BrokenPreconditionsThrow) {
  EXPECT_THROW(total(Strips{{at(0), -1, 4, 4}}), std::invalid_argument);
  EXPECT_THROW(total(Strips{{at(0), 1, -4, 4}}), std::invalid_argument);
  EXPECT_THROW(total(Strips{{at(0), 2, 4, 3}}), std::invalid_argument);
  EXPECT_THROW(total(Strips{{nullptr, 1, 4, 4}}), std::invalid_argument);
  const std::int64_t big = std::int64_t{1} << 40;
  EXPECT_THROW(total(Strips{{at(0), big, big, big}}), std::invalid_argument);
  EXPECT_THROW(cut(sample(), 0, total(sample()) + 1), std::invalid_argument);
  EXPECT_THROW(cut(sample(), 2, 1), std::invalid_argument);
  EXPECT_THROW(pack(read_only(sample()), memory), std::invalid_argument);
}

}  // namespace
}  // namespace dattn::comm
