#include "kernels/dropped.hpp"

#include <gtest/gtest.h>

#include "tests/cases.hpp"

namespace dattn {
namespace {

/// Whether a query head that reads `key_head` sees the key with one of `queries`.
bool seen(const Mask& mask, const Shape& shape, Index key_head, const Run& queries, Index key) {
  for (Index h = 0; h < shape.query_heads; ++h) {
    if (shape.key_head(h) != key_head) continue;
    for (Index i = 0; i < queries.count; ++i) {
      if (mask.allows(h, queries.at(i), key)) return true;
    }
  }
  return false;
}

TEST(Dropped, IsWhatNoQuerySeesBeforeTheFirst) {
  int some = 0;
  int none = 0;
  for (const Heads heads : head_counts()) {
    for (const Lengths l : {Lengths{1, 1}, {3, 29}, {1, 40}, {29, 29}, {23, 9}, {12, 31}}) {
      const Shape shape = shape_of(l, heads);
      auto words = masks(shape);
      words.push_back("stream:sink=2,recent=5");
      if (heads.query == 6)
        words.push_back("stream:sink=2,recent=5@0-2;causal@3;stream:sink=3,recent=1@4-5");
      for (const std::string& mask_words : words) {
        const MaskPtr mask = parse_mask(mask_words, shape, open_blocks);
        // Those of the shape, and later ones, as of a cache.
        for (const dattn::Run queries :
             {dattn::Run{shape.first_query(), shape.queries, 1}, dattn::Run{shape.keys, 7, 1}}) {
          const std::vector<Dropped> found = dropped_keys(*mask, shape, queries);
          std::size_t at = 0;
          for (Index h = 0; h < shape.query_heads; ++h) {
            Ranges want;
            for (Index k = 0; k < std::min(queries.first, shape.keys); ++k) {
              if (!seen(*mask, shape, shape.key_head(h), queries, k)) append(want, {k, k + 1});
            }
            if (want.empty()) {
              ++none;
              continue;
            }
            // The entry of this head is that of the head before, or the next one.
            if (at < found.size() && found[at].query_heads.end <= h) ++at;
            ASSERT_LT(at, found.size()) << mask_words << ", head " << h;
            EXPECT_TRUE(found[at].query_heads.contains(h)) << mask_words << ", head " << h;
            EXPECT_EQ(found[at].key_head, shape.key_head(h)) << mask_words;
            EXPECT_EQ(found[at].value_head, shape.value_head(h)) << mask_words;
            EXPECT_EQ(found[at].keys, want) << mask_words << ", head " << h;
            ++some;
          }
          // And no other entries.
          Index served = 0;
          for (const Dropped& entry : found) {
            served += entry.query_heads.size();
            EXPECT_FALSE(entry.keys.empty());
          }
          Index wanted = 0;
          for (Index h = 0; h < shape.query_heads; ++h) {
            bool any = false;
            for (Index k = 0; k < std::min(queries.first, shape.keys); ++k) {
              any = any || !seen(*mask, shape, shape.key_head(h), queries, k);
            }
            wanted += any ? 1 : 0;
          }
          EXPECT_EQ(served, wanted) << mask_words;
        }
      }
    }
  }
  EXPECT_GT(some, 500);  // else nothing was tested
  EXPECT_GT(none, 500);
}

TEST(Dropped, OfOneKeyHeadThatTwoValueHeadsServeIsTwoEntries) {
  const Shape shape{1, 9, 4, 1, 2, 2, 2};
  const auto found =
      dropped_keys(*parse_mask("stream:sink=1,recent=2@0-1;stream:sink=1,recent=3@2-3", shape),
                   shape, {8, 1, 1});
  ASSERT_EQ(found.size(), 2u);
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(found[i].query_heads,
              Range({static_cast<Index>(2 * i), static_cast<Index>(2 * i + 2)}));
    EXPECT_EQ(found[i].value_head, static_cast<Index>(i));
    EXPECT_EQ(found[i].keys, (Ranges{{1, 6}}));  // the wider stream's, for both
  }
}

}  // namespace
}  // namespace dattn
