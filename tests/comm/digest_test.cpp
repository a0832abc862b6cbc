// Digests against values that xxHash's own test suite publishes, and however strips are cut.
#include "comm/digest.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

namespace dattn::comm {
namespace {

TEST(Digest, IsXxh3OfTheBytesHoweverStripsAreCut) {
  if (!has_digest()) GTEST_SKIP() << "this build has no xxHash";
  EXPECT_EQ(digest_text(digest_of(ConstStrips{})), "2d06800538d394c2");  // of nothing, seed 0
  std::vector<std::byte> bytes(3 << 20);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 31 % 251);
  const std::uint64_t whole = digest_of(bytes);
  // Columns of a table, one beside the other, are its rows' bytes in another order; one strip of
  // rows that touch is the same order.
  const std::int64_t row = 1024;
  const auto rows = static_cast<std::int64_t>(bytes.size()) / row;
  int polls = 0;
  EXPECT_EQ(digest_of({{bytes.data(), rows, row, row}}, [&] { ++polls; }), whole);
  EXPECT_EQ(polls, 3);
  EXPECT_EQ(digest_of({{bytes.data(), 1, 7, 7}, {bytes.data() + 7, 1, std::ssize(bytes) - 7, 0}}),
            whole);
  EXPECT_NE(
      digest_of({{bytes.data(), rows, row / 2, row}, {bytes.data() + row / 2, rows, row / 2, row}}),
      whole);
  std::vector<std::byte> spread;
  for (std::int64_t i = 0; i < rows; ++i) {
    spread.insert(spread.end(), bytes.begin() + i * row, bytes.begin() + (i + 1) * row);
    spread.resize(spread.size() + 64);
  }
  EXPECT_EQ(digest_of({{spread.data(), rows, row, row + 64}}), whole);
  bytes[bytes.size() / 2] ^= std::byte{0x10};
  EXPECT_NE(digest_of(bytes), whole);
}

}  // namespace
}  // namespace dattn::comm
