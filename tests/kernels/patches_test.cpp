// Queries of grids in patches: for which masks, and attention so against the reference.
#include "kernels/patches.hpp"

#include <gmock/gmock.h>

#include "tests/kernels/variants.hpp"

namespace dattn {
namespace {

constexpr double kBound = 1e-6;        ///< of O and LSE; kernels/README.md states both
constexpr double kBoundNarrow = 4e-3;  ///< likewise of bfloat16

std::optional<Patches> patches(const Shape& shape, const std::string& words, const Kernel& kernel) {
  return patches_of(everything(shape), *parse_mask(words, shape), 0,
                    shape.query_heads / shape.key_heads, kernel);
}

TEST(Patches, OrderRowsStripByStrip) {
  Patches grid{.row = 6, .width = 4, .earlier = 2};
  const StripOrder queries = order_of_queries({{0, 12, 1}}, grid);
  EXPECT_THAT(queries.rows, testing::ElementsAre(0, 1, 2, 3, 6, 7, 8, 9, 4, 5, 10, 11));
  const StripOrder keys = order_of_keys({{0, 12, 1}}, grid);
  EXPECT_THAT(keys.rows, testing::ElementsAre(0, 1, 6, 7, 2, 3, 4, 5, 8, 9, 10, 11));
  // A rank's rows, of which the first stands in the middle of the grid, and before it.
  const StripOrder some = order_of_queries({{3, 4, 1}, {-2, 2, 1}}, grid);
  EXPECT_THAT(some.rows, testing::ElementsAre(0, 3, 1, 2, 4, 5));
}

TEST(Patches, AreOfMasksWhoseRowsSeeAGrid) {
  const Kernel& kernel = *chosen_isa().f4;
  const auto flat = patches({4096, 4096, 2, 2, 2, 64, 64}, "neighbor:dims=64x64,window=13", kernel);
  ASSERT_TRUE(flat);
  EXPECT_EQ(flat->row, 64);
  EXPECT_EQ(flat->plane, 0);
  EXPECT_GT(flat->width, 1);
  const auto solid =
      patches({4096, 4096, 2, 2, 2, 64, 64}, "neighbor:dims=16x16x16,window=5", kernel);
  ASSERT_TRUE(solid);
  EXPECT_EQ(solid->row, 16);
  EXPECT_EQ(solid->plane, 256);
}

TEST(Patches, AreNotOfOtherMasks) {
  for (const char* words :
       {"causal", "full", "window:511,0", "stream:sink=64,recent=256",
        "s2:block=64,local=4,stride=8", "s2:block=16,local=4,stride=4,step=1",
        "documents:2000,2096", "neighbor:dims=64x64,window=7,tile=8x8",
        "neighbor:dims=4096,window=13", "neighbor:dims=64x64,window=16,stride=16,tile=16"}) {
    EXPECT_FALSE(patches({4096, 4096, 2, 2, 2, 64, 64}, words, *chosen_isa().f4)) << words;
  }
}

const std::vector<ShapeMask>& cases() {
  static const std::vector<ShapeMask> table{
      {{528, 528, 2, 2, 2, 16, 24}, "neighbor:dims=24x22,window=7"},
      {{437, 437, 6, 2, 1, 17, 33}, "neighbor:dims=19x23,window=9x7,causal=1x0"},
      {{600, 600, 2, 1, 1, 8, 5}, "neighbor:dims=10x12x5,window=5x5x3"},
      {{900, 900, 1, 1, 1, 12, 12}, "neighbor:dims=30x30,window=7,dilation=2"},
      {{300, 528, 2, 2, 2, 16, 16}, "neighbor:dims=24x22,window=7"},  // the last rows
      {{528, 528, 4, 4, 2, 16, 16}, "causal@0;neighbor:dims=24x22,window=7@1-2;window:9,0@3"},
  };
  return table;
}

/// Every instruction set of this machine, on every case.
class AttendPatches : public testing::TestWithParam<const Isa*> {
 protected:
  Work work(int threads = 1) const { return {.threads = threads, .isa = GetParam()}; }
};

TEST_P(AttendPatches, MatchesTheReference) {
  for (const ShapeMask& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const auto check = [&]<class T>(T, double bound) {
      const auto problem = random_problem<T>(c.shape, c.mask);
      const auto found = attend_whole(problem, work());
      const Distance d = distance(problem, everything(c.shape), found);
      EXPECT_LE(d.o, bound);
      EXPECT_LE(d.lse, bound);
      EXPECT_EQ(found.numbers, attend_whole(problem, work(3)).numbers);  // to the bit
    };
    check(float{}, kBound);
    check(BFloat16{}, kBoundNarrow);
  }
}

/// As ranks have them: queries and keys in several runs, results merged.
TEST_P(AttendPatches, MergesBlocksInSeveralRuns) {
  const Shape shape{528, 528, 2, 1, 1, 16, 16};
  const auto problem = random_problem<float>(shape, "neighbor:dims=24x22,window=7");
  const Runs queries{{30, 200, 1}, {260, 268, 1}};
  Work how = work();
  how.score = problem.score;
  const Where where = block(shape, {0, 2}, queries, {});
  auto out = empty_partial<float>(where);
  for (const Runs& keys : {Runs{{0, 90, 1}, {310, 218, 1}}, Runs{{90, 220, 1}}}) {
    attend_block(problem, block(shape, {0, 2}, queries, keys), how, out);
  }
  const Distance d = distance(problem, where, out);
  EXPECT_LE(d.o, kBound);
  EXPECT_LE(d.lse, kBound);
}

TEST_P(AttendPatches, KeepsToTheRulesOfScores) {
  const Shape shape{396, 396, 4, 2, 1, 16, 16};
  for (const Variant& variant : variants_of_scores()) {
    SCOPED_TRACE(variant.name);
    auto problem = random_problem<float>(shape, "neighbor:dims=18x22,window=7");
    apply(variant, problem);
    const Distance d = distance(problem, everything(shape), attend_whole(problem, work()));
    EXPECT_LE(d.o, kBound);
    EXPECT_LE(d.lse, 2 * kBound);
  }
}

TEST_P(AttendPatches, KeepsNaNToTheQueriesThatSeeIt) {
  const Shape shape{528, 528, 1, 1, 1, 16, 16};
  auto problem = random_problem<float>(shape, "neighbor:dims=24x22,window=7");
  const Index key = 10 * 22 + 9;
  *problem.v.view().at(key, 0) = std::numeric_limits<float>::quiet_NaN();
  const Finished<float> found(attend_whole(problem, work()));
  for (Index row = 0; row < shape.queries; ++row) {
    EXPECT_EQ(std::isnan(*found.o.view().at(row, 0)), problem.mask->allows(0, row, key)) << row;
  }
}

TEST_P(AttendPatches, TakesKeysInSeveralGoes) {
  const Shape shape{4900, 4900, 1, 1, 1, 4, 4};
  const auto problem = random_problem<float>(shape, "neighbor:dims=70x70,window=65");
  const Where where = block(shape, {0, 1}, {{4500, 400, 1}}, {{0, 4900, 1}});
  const Tensor<float> q = cut(problem.q, where.queries, {0, 1}, 0);
  auto out = empty_partial<float>(where);
  Work how = work();
  how.score = problem.score;
  attend_patches(q.view(), problem.k.view(), problem.v.view(), out.view(), where, *problem.mask,
                 how, {.row = 70, .width = 8}, head_groups(where, *problem.mask));
  const Distance d = distance(problem, where, out, 37);
  EXPECT_LE(d.o, kBound);
  EXPECT_LE(d.lse, kBound);
}

INSTANTIATE_TEST_SUITE_P(Isa, AttendPatches,
                         testing::ValuesIn(available_isas().begin(), available_isas().end()),
                         [](const auto& isa) { return std::string(isa.param->name); });

}  // namespace
}  // namespace dattn
