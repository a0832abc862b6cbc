// Attention against the reference in double, over shapes x masks x blocks x instruction sets.
#include "kernels/attend.hpp"

#include <gmock/gmock.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "tests/kernels/variants.hpp"

namespace dattn {
namespace {

constexpr double kBoundO = 1e-6;  ///< relative, Frobenius; kernels/README.md states both
constexpr double kBoundLse = 1e-6;

/// Suffixes that few queries see each: they are read as they lie.
const ShapeMask kBatch{{36, 1901, 8, 2, 4, 24, 40},
                       "batch:sequences=12,new=3,levels=1x401:3x100,suffix=100"};

const std::vector<ShapeMask>& cases() {
  static const std::vector<ShapeMask> table{
      {{1, 1, 1, 1, 1, 1, 1}, "causal"},
      {{1, 95, 2, 1, 1, 3, 17}, "full"},
      {{63, 96, 2, 2, 1, 17, 3}, "causal"},
      {{64, 97, 1, 1, 1, 48, 64}, "full"},
      {{65, 200, 4, 2, 1, 64, 48}, "causal"},
      {{130, 130, 6, 3, 2, 80, 80}, "causal"},
      {{130, 97, 2, 1, 2, 128, 128}, "causal"},  // the first rows see no key
      {{97, 97, 1, 1, 1, 256, 128}, "full"},
      {{200, 200, 2, 1, 1, 33, 31}, "window:5,3"},
      {{200, 200, 2, 2, 2, 64, 64}, "window:0,0"},
      {{200, 200, 2, 2, 2, 16, 256}, "causal+window:70,0/sink:4"},
      {{191, 191, 3, 1, 3, 8, 5}, "documents:1,0,95,2,93"},
      {{130, 300, 2, 1, 1, 24, 40}, "causal+documents:100,100,100"},
      {{100, 300, 2, 2, 2, 24, 40}, "prefix:250"},
      {{65, 96, 1, 1, 1, 4, 2}, "sink:0"},
      {{65, 97, 1, 1, 1, 5, 6}, "sink:97"},
      {{130, 130, 4, 2, 4, 12, 9}, "causal@0;full@1;window:9,0/sink:2@2;documents:65,65@3"},
      // Keys are taken in orders of the heads' own.
      {{200, 300, 4, 2, 1, 24, 40}, "s2:block=4,local=2,stride=4,step=1"},
      {{260, 260, 3, 3, 3, 17, 33}, "s2:block=8,local=1,stride=5,step=1,dense=1/sink:3"},
      // Residues are taken one by one.
      {{170, 200, 4, 2, 1, 24, 40}, "causal+dilated:30,9,3"},
      {{1, 300, 4, 2, 2, 16, 16}, "dilated:40,0,7"},
      // And beside keys that have none.
      {{170, 200, 4, 2, 1, 24, 40}, "dilated:30,9,3/sink:20/window:9,4"},
      {{170, 200, 4, 2, 1, 24, 40},
       "causal@0;dilated:30,9,3/window:9,4@1-2;sink:7/dilated:20,3,2@3"},
      {{170, 200, 4, 2, 1, 24, 40}, "causal@0;dilated:30,9,3@1-2;dilated:20,3,2@3"},
      {{260, 260, 2, 1, 1, 17, 33}, "neighbor:dims=13x20,window=5x4,dilation=2x2"},
      kBatch,
      {{150, 150, 2, 2, 2, 8, 8}, "s2:block=2,local=3,stride=6,step=1@0;causal@1"},
  };
  return table;
}

/// Every instruction set of this machine, on every case.
class Attend : public testing::TestWithParam<const Isa*> {
 protected:
  Work work(int threads = 1) const { return {.threads = threads, .isa = GetParam()}; }
};

TEST_P(Attend, MatchesTheReference) {
  for (const ShapeMask& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const auto problem = random_problem<float>(c.shape, c.mask);
    const Distance d = distance(problem, everything(c.shape), attend_whole(problem, work()));
    EXPECT_LE(d.o, kBoundO);
    EXPECT_LE(d.lse, kBoundLse);
  }
}

TEST_P(Attend, GivesTheSameBitsForAnyNumberOfThreads) {
  for (const ShapeMask& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const auto problem = random_problem<float>(c.shape, c.mask);
    const auto one = attend_whole(problem, work(1));
    EXPECT_EQ(attend_whole(problem, work(2)).numbers, one.numbers);
    EXPECT_EQ(attend_whole(problem, work(3)).numbers, one.numbers);
  }
}

// One thread has places for as many packed tiles as the rows that it looked at see; here one
// document among them is longer, and its tiles take each other's places.
TEST_P(Attend, TakesTilesThatHaveOnePlace) {
  const Shape shape{11200, 11200, 4, 4, 4, 16, 16};
  std::string mask = "documents:11,900";
  for (Index at = 911; at < shape.keys; at += 10) {
    mask += "," + std::to_string(std::min<Index>(10, shape.keys - at));
  }
  const auto problem = random_problem<float>(shape, mask + "+causal");
  const auto one = attend_whole(problem, work(1));
  EXPECT_EQ(attend_whole(problem, work(3)).numbers, one.numbers);
}

/// Rows as the ranks of three partitions hold them.
std::vector<std::vector<Runs>> partitions(Index n) {
  const auto edge = [&](Index p) { return even_part(n, 8, p).begin; };
  return {
      {{{0, edge(3), 1}}, {{edge(3), 0, 1}}, {{edge(3), n - edge(3), 1}}},  // contiguous
      {{{0, edge(2), 1}, {edge(6), n - edge(6), 1}}, {{edge(2), edge(6) - edge(2), 1}}},  // zigzag
      {{{0, (n + 2) / 3, 3}}, {{1, (n + 1) / 3, 3}}, {{2, n / 3, 3}}},                    // strided
  };
}

TEST_P(Attend, MergesTheBlocksOfAnyPartitionInAnyOrder) {
  for (const ShapeMask& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const auto problem = random_problem<float>(c.shape, c.mask);
    Work how = work();
    how.score = problem.score;
    // Half of the heads, if whole groups of keys and values allow it.
    const Index kept = c.shape.query_heads % 2 == 0 ? c.shape.query_heads / 2 : 0;
    const Range heads{kept, c.shape.query_heads};
    const auto query_sides = partitions(c.shape.queries);
    const auto key_sides = partitions(c.shape.keys);
    for (std::size_t i = 0; i < key_sides.size(); ++i) {
      for (Runs queries : query_sides[i]) {
        for (auto& run : queries) run.first += c.shape.first_query();
        for (const bool backwards : {false, true}) {
          std::vector<Runs> keys = key_sides[i];
          if (backwards) std::reverse(keys.begin(), keys.end());
          const Where whole = block(c.shape, heads, queries, {});
          auto out = empty_partial<float>(whole);
          for (const Runs& part : keys) {
            attend_block(problem, block(c.shape, heads, queries, part), how, out);
          }
          const Distance d = distance(problem, whole, out, 3);  // every third row
          EXPECT_LE(d.o, kBoundO) << "partition " << i;
          EXPECT_LE(d.lse, kBoundLse) << "partition " << i;
        }
      }
    }
  }
}

TEST_P(Attend, TakesABlockWithMoreHeadsThanItReads) {
  const Shape shape{40, 100, 6, 3, 2, 16, 24};
  const auto problem = random_problem<float>(shape, "causal");
  Work how = work();
  how.score = problem.score;
  const Where where{shape, {2, 3}, {0, 2}, {0, 2}, {{60, 40, 1}}, {{0, 100, 1}}};
  auto out = empty_partial<float>(where);
  attend_block(problem, where, how, out);
  const Distance d = distance(problem, where, out);
  EXPECT_LE(d.o, kBoundO);
  EXPECT_LE(d.lse, kBoundLse);
}

TEST_P(Attend, StaysWithinItsBoundsOverManyKeys) {
  const Shape shape{192, 4096, 1, 1, 1, 128, 128};
  const auto problem = random_problem<float>(shape, "causal");
  const Distance d = distance(problem, everything(shape), attend_whole(problem, work()), 3);
  EXPECT_LE(d.o, kBoundO);
  EXPECT_LE(d.lse, kBoundLse);
}

TEST_P(Attend, KeepsToItsRulesWhereFewQueriesSeeAKey) {
  for (const Variant& variant : variants_of_scores()) {
    if (variant.alibi) continue;  // places in memory are far apart: scores too large for the bounds
    SCOPED_TRACE(variant.name);
    auto problem = random_problem<float>(kBatch.shape, kBatch.mask);
    apply(variant, problem);
    const Distance d = distance(problem, everything(kBatch.shape), attend_whole(problem, work(2)));
    EXPECT_LE(d.o, kBoundO);
    EXPECT_LE(d.lse, 2 * kBoundLse);
  }
}

TEST_P(Attend, KeepsNaNToTheFewQueriesThatSeeIt) {
  auto problem = random_problem<float>(kBatch.shape, kBatch.mask);
  const Index key = 701 + 5 * 100 + 98;  // the second new token of sequence 5
  for (Index h = 0; h < 4; ++h) {
    *problem.v.view().at(key, h) = std::numeric_limits<float>::quiet_NaN();
  }
  const Finished<float> found(attend_whole(problem, work()));
  for (Index row = 0; row < 36; ++row) {
    for (Index h = 0; h < 8; ++h) {
      EXPECT_EQ(std::isnan(*found.o.view().at(row, h)), row == 16 || row == 17) << row << ' ' << h;
    }
  }
}

TEST_P(Attend, RethrowsWhatAPollThrowsWhereFewQueriesSeeAKey) {
  const auto problem = random_problem<float>(kBatch.shape, kBatch.mask);
  int polls = 0;
  Work how = work(2);
  how.poll = [&] {
    if (++polls == 3) throw std::runtime_error("enough");
  };
  EXPECT_THROW(for (int i = 0; i < 1000; ++i) attend_whole(problem, how), std::runtime_error);
}

TEST_P(Attend, TakesNoMoreMemoryThanItSays) {
  std::vector<ShapeMask> all = cases();
  all.push_back({{1, 3000, 32, 8, 8, 16, 16}, "causal"});   // decode, in parts
  all.push_back({{300, 2000, 2, 1, 1, 16, 16}, "causal"});  // few tiles of queries, many of keys
  all.push_back({{300, 2000, 8, 8, 8, 64, 64}, "causal"});  // packs are most of it
  const auto check = [&]<class T>(const ShapeMask& c, const Kernel& kernel, T) {
    SCOPED_TRACE(name_of(c));
    Workspace workspace;
    Work how = work();
    how.workspace = &workspace;
    attend_whole(random_problem<T>(c.shape, c.mask), how);
    EXPECT_LE(workspace.bytes(),
              attend_bytes(c.shape, c.shape.queries, c.shape.query_heads, c.shape.keys, 1, kernel));
  };
  for (const ShapeMask& c : all) {
    check(c, *GetParam()->f4, float{});
    check(c, *GetParam()->bf16, BFloat16{});
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Attend,
                         testing::ValuesIn(available_isas().begin(), available_isas().end()),
                         [](const auto& one) { return std::string(one.param->name); });

TEST(AttendDouble, MatchesTheReferenceToRounding) {
  for (const ShapeMask& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const auto problem = random_problem<double>(c.shape, c.mask);
    const auto one = attend_whole(problem, {});
    const Distance d = distance(problem, everything(c.shape), one);
    EXPECT_LE(d.o, 1e-14);
    EXPECT_LE(d.lse, 1e-14);
    EXPECT_EQ(attend_whole(problem, {.threads = 3}).numbers, one.numbers);
  }
}

TEST(AttendDouble, MergesTheBlocksOfAnyPartition) {
  for (const ShapeMask& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const auto problem = random_problem<double>(c.shape, c.mask);
    for (const std::vector<Runs>& sides : partitions(c.shape.keys)) {
      Where where = everything(c.shape);
      auto out = empty_partial<double>(where);
      for (const Runs& keys : sides) {
        where.keys = keys;
        attend_block(problem, where, {.score = problem.score}, out);
      }
      const Distance d = distance(problem, where, out);
      EXPECT_LE(d.o, 1e-14);
      EXPECT_LE(d.lse, 1e-14);
    }
  }
}

TEST(Isa, ListsPortableLastAndChoosesOneOfTheList) {
  const auto isas = available_isas();
  ASSERT_FALSE(isas.empty());
  EXPECT_STREQ(isas.back()->name, "portable");
  EXPECT_NE(std::find(isas.begin(), isas.end(), &chosen_isa()), isas.end());
}

}  // namespace
}  // namespace dattn
