#include "kernels/shape.hpp"

#include <gmock/gmock.h>

namespace dattn {
namespace {

using testing::HasSubstr;

TEST(Shape, GroupsOfQueryHeadsShareAKeyHead) {
  const Shape shape{.queries = 3, .keys = 5, .query_heads = 6, .key_heads = 3, .value_heads = 2};
  const std::vector<Index> keys{0, 0, 1, 1, 2, 2};
  const std::vector<Index> values{0, 0, 0, 1, 1, 1};
  for (Index h = 0; h < 6; ++h) {
    EXPECT_EQ(shape.key_head(h), keys[static_cast<std::size_t>(h)]);
    EXPECT_EQ(shape.value_head(h), values[static_cast<std::size_t>(h)]);
  }
  EXPECT_EQ(shape.key_heads_of({1, 3}), (Range{0, 2}));
  EXPECT_EQ(shape.value_heads_of({2, 4}), (Range{0, 2}));
  EXPECT_TRUE(shape.key_heads_of({4, 4}).empty());
  EXPECT_EQ(shape.first_query(), 2);
}

TEST(Shape, ComplainsInOneLineOfWhatNobodyCanCompute) {
  const Shape good{.queries = 8, .keys = 8, .query_heads = 4, .key_heads = 2, .value_heads = 1};
  EXPECT_EQ(complaint(good), std::nullopt);
  Shape bad = good;
  bad.keys = 0;
  EXPECT_THAT(complaint(bad).value_or(""), HasSubstr("keys must be at least 1, not 0"));
  bad = good;
  bad.d_v = -3;
  EXPECT_THAT(complaint(bad).value_or(""), HasSubstr("head dim of V must be at least 1, not -3"));
  bad = good;
  bad.key_heads = 3;
  EXPECT_THAT(complaint(bad).value_or(""), HasSubstr("4 query heads are no multiple of 3 key"));
  bad = good;
  bad.value_heads = 8;
  EXPECT_THAT(complaint(bad).value_or(""), HasSubstr("no multiple of 8 value heads"));
  bad = good;
  bad.queries = bad.keys = Index{1} << 31;
  EXPECT_THAT(complaint(bad).value_or(""), HasSubstr("passes 2^60"));
}

}  // namespace
}  // namespace dattn
