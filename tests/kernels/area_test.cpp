#include "kernels/area.hpp"

#include <gmock/gmock.h>

#include "tests/block_files.hpp"

namespace dattn {
namespace {

using testing::ElementsAre;
using testing::Pair;

constexpr Index kKeys = 48;

struct Brute {
  Index area = 0;
  std::vector<Index> keys;  ///< seen, ascending
};

Brute brute(const Mask& mask, Index head, const Runs& queries, const Runs& keys) {
  Brute out;
  for (const Run& k : keys) {
    for (Index j = 0; j < k.count; ++j) {
      const Index before = out.area;
      for (const Run& q : queries) {
        for (Index i = 0; i < q.count; ++i) out.area += mask.allows(head, q.at(i), k.at(j)) ? 1 : 0;
      }
      if (out.area > before) out.keys.push_back(k.at(j));
    }
  }
  return out;
}

bool holds(const Runs& runs, Index position) {
  for (const Run& run : runs) {
    for (Index i = 0; i < run.count; ++i) {
      if (run.at(i) == position) return true;
    }
  }
  return false;
}

/// More pieces than are looked at one by one, and a run whose step is long.
Runs pieces() {
  Runs runs{{3, 2, 25}};
  for (Index at = 0; at < kKeys; at += at % 5 == 0 ? 2 : 3) runs.push_back({at, 1, 1});
  return runs;
}

/// Rows as a rank may hold them; counts of 1 with a long step are what an even split leaves.
const std::vector<Runs>& holdings() {
  static const std::vector<Runs> table{
      {{0, kKeys, 1}},                                             // all
      {{13, 11, 1}},                                               // contiguous
      {{9, 33, 1}},                                                // enough rows to be asked
      {{3, 9, 1}, {36, 9, 1}},                                     // zigzag
      {{2, 12, 4}},                                                // strided
      {{0, 12, 4}, {1, 12, 4}},                                    // neighbours, strided
      {{5, 3, 16}},                                                // strided far
      {{7, 1, 48}},                                                // one row with a step
      {{40, 8, 1}, {0, 10, 3}, {1, 1, 1}},                         // not ascending
      {{0, 12, 4}, {2, 2, 4}, {21, 3, 8}, {23, 6, 4}},             // woven, some far longer
      {{1, 3, 4}, {2, 12, 4}, {3, 2, 4}, {20, 1, 1}, {33, 4, 4}},  // neighbours likewise
      {{30, 1, 1}, {0, 1, 1}, {3, 1, 1}, {47, 1, 1}, {5, 2, 1}, {11, 1, 1}, {17, 3, 1}},
      pieces(),
      {},  // none
      {{5, 0, 1}},
  };
  return table;
}

class EveryMask : public testing::TestWithParam<const char*> {};

TEST_P(EveryMask, AgreesWithCountingPairs) {
  const Shape shape{.queries = kKeys + 5, .keys = kKeys, .query_heads = 2};
  const MaskPtr mask = parse_mask(GetParam(), shape, open_blocks);
  std::vector<Runs> queries = holdings();
  queries.push_back({{-5, 53, 1}});
  queries.push_back({{-4, 10, 5}});
  for (Index head = 0; head < 2; ++head) {
    for (const Runs& q : queries) {
      for (const Runs& k : holdings()) {
        const Brute expected = brute(*mask, head, q, k);
        EXPECT_EQ(area(*mask, head, q, k), expected.area);
        Index seeing = 0;
        for (const dattn::Run& run : q) {
          for (Index i = 0; i < run.count; ++i) {
            if (brute(*mask, head, {{run.at(i), 1, 1}}, k).area > 0) ++seeing;
          }
        }
        EXPECT_EQ(rows_seeing(*mask, head, q, k), seeing);
        const std::optional<dattn::Pair> pair = allowed_pair(*mask, head, q, k);
        ASSERT_EQ(pair.has_value(), expected.area > 0);
        if (!pair) continue;
        EXPECT_TRUE(mask->allows(head, pair->query, pair->key));
        EXPECT_TRUE(holds(q, pair->query) && holds(k, pair->key));
      }
      if (q.size() == 1 && q.front().step == 1) {
        const Range all = q.front().bounds();
        for (const Runs& k : holdings()) {
          Ranges expected;
          for (Index i = all.begin; i < all.end; ++i) {
            if (brute(*mask, head, {{i, 1, 1}}, k).area > 0) append(expected, {i, i + 1});
          }
          EXPECT_EQ(queries_seeing(*mask, head, all, k), expected);
        }
      }
      for (const Index keys : {Index{0}, Index{1}, Index{20}, kKeys}) {
        Ranges expected;
        for (const Index k : brute(*mask, head, q, {{0, keys, 1}}).keys) {
          append(expected, {k, k + 1});
        }
        EXPECT_EQ(keys_seen(*mask, head, q, keys), expected);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Table, EveryMask,
    testing::Values("full", "causal", "window:0,0", "window:7,0", "window:0,20",
                    "documents:1,0,20,9,18", "prefix:5", "sink:3", "causal+window:5,5/sink:2",
                    "causal+documents:24,24", "s2:block=4,local=2,stride=3",
                    "s2:relative=1,block=3,local=2x1,stride=4", "dilated:3,1,4", "dilated:1,1,30",
                    "dilated:1,1,1073741823+dilated:1,1,1073741822", "dilated:3,1,4/sink:3",
                    "causal+(dilated:3,1,4/window:2,0)",
                    "neighbor:dims=8x6,window=2x3,dilation=3x2", "neighbor:dims=8x6,window=5x3",
                    "neighbor:dims=8x6,window=5x3,stride=2x1,tile=3",
                    "causal+neighbor:dims=16x3,window=9x2", "stream:sink=3,recent=6", "sink:0",
                    "causal@0;window:3,0/sink:1@1",
                    "blocks:size=9x4,rows=\"rows 2x6x12\",columns=\"columns 2x6x12\"",
                    "causal+blocks:size=20x16,rows=\"rows 0x3x3\",columns=\"columns 0x3x3\""));

TEST(Area, OfAMillionCausalTokensIsTheTriangle) {
  constexpr Index n = Index{1} << 20;
  const Shape shape{.queries = n, .keys = n};
  const MaskPtr causal = parse_mask("causal", shape);
  EXPECT_EQ(area(*causal, 0, {{0, n, 1}}, {{0, n, 1}}), n * (n + 1) / 2);
  // The second rank of two contiguous ones, and of sixteen strided ones, against all keys.
  EXPECT_EQ(area(*causal, 0, {{n / 2, n / 2, 1}}, {{0, n, 1}}), n / 2 * (3 * n / 2 + 1) / 2);
  constexpr Index m = n / 16;
  EXPECT_EQ(area(*causal, 0, {{1, m, 16}}, {{0, n, 1}}), 16 * (m * (m - 1) / 2) + 2 * m);
  // Strided on both sides: query 1 + 16 i sees key 3 + 16 j for j < i, and key 1 + 16 j for j <= i.
  EXPECT_EQ(area(*causal, 0, {{1, m, 16}}, {{3, m, 16}}), m * (m - 1) / 2);
  EXPECT_EQ(area(*causal, 0, {{1, m, 16}}, {{1, m, 16}}), m * (m + 1) / 2);
}

TEST(Area, OfKeysAnyNumberOfPositionsApart) {
  constexpr Index far = Index{1} << 40;
  const MaskPtr causal = parse_mask("causal", {.queries = 3 * far, .keys = 3 * far});
  EXPECT_EQ(area(*causal, 0, {{far, 2, far}}, {{5, 3, far}}), 1 + 2);
}

TEST(Area, OfAMillionTokensUnderAWindowIsItsBand) {
  constexpr Index n = Index{1} << 20;
  const MaskPtr window = parse_mask("window:1023,0", {.queries = n, .keys = n});
  EXPECT_EQ(area(*window, 0, {{0, n, 1}}, {{0, n, 1}}), 1024 * n - 1024 * 1023 / 2);
  EXPECT_THAT(keys_seen(*window, 0, {{n / 2, n / 4, 1}}, n),
              ElementsAre(Range{n / 2 - 1023, n / 2 + n / 4}));
}

TEST(Area, OfQueriesThatSeeSomeKeys) {
  constexpr Index n = Index{1} << 20;
  const MaskPtr window = parse_mask("window:1023,0", {.queries = n, .keys = n});
  EXPECT_THAT(queries_seeing(*window, 0, {0, n}, {{n / 2, n / 4, 1}}),
              ElementsAre(Range{n / 2, 3 * n / 4 + 1023}));
  const MaskPtr causal = parse_mask("causal", {.queries = n, .keys = n});
  EXPECT_THAT(queries_seeing(*causal, 0, {0, n}, {{5, n / 16, 16}}), ElementsAre(Range{5, n}));
}

TEST(Variants, CountTheHeadsOfEachRowOfATable) {
  const Shape shape{.queries = 4, .keys = 4, .query_heads = 8};
  const MaskPtr table = parse_mask("causal@0-2;full@3;sink:1@4-7", shape);
  EXPECT_THAT(variants(*table, {0, 8}), ElementsAre(Pair(0, 3), Pair(3, 1), Pair(4, 4)));
  EXPECT_THAT(variants(*table, {2, 5}), ElementsAre(Pair(2, 1), Pair(3, 1), Pair(4, 1)));
  EXPECT_THAT(variants(*table, {5, 5}), ElementsAre());
  EXPECT_THAT(variants(*parse_mask("causal", shape), {1, 8}), ElementsAre(Pair(1, 7)));
}

}  // namespace
}  // namespace dattn
