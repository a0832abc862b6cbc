// Which keys attend takes by panels and which by decode.
#include "kernels/readers.hpp"

#include <gmock/gmock.h>

#include "kernels/decode.hpp"

namespace dattn {
namespace {

struct Found {
  Readers readers;
  MaskPtr mask;
  Shape shape;
};

Found find(const Shape& shape, const std::string& words) {
  const MaskPtr mask = parse_mask(words, shape);
  const Where where{shape,
                    {0, shape.query_heads},
                    {0, shape.key_heads},
                    {0, shape.value_heads},
                    {{shape.first_query(), shape.queries, 1}},
                    {{0, shape.keys, 1}}};
  return {readers_of(where, *mask, head_groups(where, *mask)), mask, shape};
}

/// How often each (row, key) is computed.
std::vector<int> computed(const Found& f) {
  std::vector<int> times(static_cast<std::size_t>(f.shape.queries * f.shape.keys));
  const auto add = [&](Range rows, Range keys) {
    for (Index q = rows.begin; q < rows.end; ++q) {
      for (Index k = keys.begin; k < keys.end; ++k) {
        ++times[static_cast<std::size_t>(q * f.shape.keys + k)];
      }
    }
  };
  for (const Range keys : f.readers.many) add({0, f.shape.queries}, keys);
  for (const std::vector<Part>& parts : f.readers.few) {
    Index row = 0;
    for (const Part& part : parts) {
      EXPECT_GE(part.rows.begin, row);
      row = part.rows.end;
      EXPECT_LE(part.rows.size() * (f.shape.query_heads / f.shape.key_heads), kDecodeLanes);
      add(part.rows, part.keys);
    }
  }
  return times;
}

void expect_every_pair_once(const Found& f) {
  const std::vector<int> times = computed(f);
  for (Index q = 0; q < f.shape.queries; ++q) {
    for (Index k = 0; k < f.shape.keys; ++k) {
      const int n = times[static_cast<std::size_t>(q * f.shape.keys + k)];
      const bool allowed = f.mask->allows(0, f.shape.first_query() + q, k);
      ASSERT_TRUE(n == 1 || (n == 0 && !allowed)) << q << ' ' << k << ": " << n;
    }
  }
}

TEST(Readers, OfTheSuffixesOfABatchAreFew) {
  const Found f =
      find({36, 1901, 8, 2, 2, 8, 8}, "batch:sequences=12,new=3,levels=1x401:3x100,suffix=100");
  expect_every_pair_once(f);
  EXPECT_THAT(f.readers.many, testing::ElementsAre(Range{0, 701}));
  ASSERT_EQ(f.readers.few.size(), 1U);
  EXPECT_EQ(f.readers.few[0].size(), 12U);  // a sequence each, its new tokens together
}

TEST(Readers, OfPrefixesMayBeFewToo) {
  const Found f = find({40, 6040, 2, 2, 2, 8, 8}, "batch:sequences=40,levels=2x3000,sizes=3x37");
  expect_every_pair_once(f);
  EXPECT_EQ(f.readers.few.size(), 1U);
}

TEST(Readers, AreManyWhereOneWayServesAll) {
  for (const char* words : {"causal", "window:3,0", "full", "batch:sequences=100,levels=1x1800",
                            "causal@0-3;batch:sequences=100,suffix=19@4-7"}) {
    EXPECT_TRUE(find({100, 1900, 8, 2, 2, 8, 8}, words).readers.few.empty()) << words;
  }
  EXPECT_TRUE(find({1, 1900, 8, 2, 2, 8, 8}, "causal").readers.few.empty());
  EXPECT_TRUE(find({5000, 5000, 1, 1, 1, 8, 8}, "window:0,0").readers.few.empty());
}

}  // namespace
}  // namespace dattn
