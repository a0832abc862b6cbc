#include "kernels/range.hpp"

#include <gmock/gmock.h>

#include <limits>
#include <random>

namespace dattn {
namespace {

using testing::ElementsAre;

std::vector<Index> members(const Ranges& ranges) {
  std::vector<Index> out;
  for (const Range r : ranges) {
    for (Index i = r.begin; i < r.end; ++i) out.push_back(i);
  }
  return out;
}

std::vector<Index> members(const Runs& runs) {
  std::vector<Index> out;
  for (const Run& run : runs) {
    for (Index i = 0; i < run.count; ++i) out.push_back(run.first + i * run.step);
  }
  return out;
}

TEST(Range, EvenPartsCoverTheWholeAndDifferByOneAtMost) {
  for (Index count = 0; count <= 40; ++count) {
    for (Index parts = 1; parts <= 9; ++parts) {
      Index next = 0;
      for (Index p = 0; p < parts; ++p) {
        const Range piece = even_part(count, parts, p);
        EXPECT_EQ(piece.begin, next);
        EXPECT_GE(piece.size(), count / parts);
        EXPECT_LE(piece.size(), (count + parts - 1) / parts);
        next = piece.end;
      }
      EXPECT_EQ(next, count) << parts << " parts";
    }
  }
}

TEST(Range, EvenPartOfTheLargestCountDoesNotOverflow) {
  constexpr Index kMost = std::numeric_limits<Index>::max();
  EXPECT_EQ(even_part(kMost, 4096, 4095).end, kMost);
  EXPECT_EQ(even_part(kMost, 2, 1).begin, kMost / 2);
}

TEST(Range, ContainsEveryEmptyRange) {
  EXPECT_TRUE((Range{2, 5}.contains(Range{9, 9})));
  EXPECT_TRUE((Range{2, 5}.contains(Range{2, 5})));
  EXPECT_FALSE((Range{2, 5}.contains(Range{4, 6})));
  EXPECT_FALSE((Range{2, 5}.contains(5)));
}

TEST(Range, IntersectionOfDistantRangesIsEmpty) {
  EXPECT_TRUE(intersect(Range{0, 3}, Range{5, 9}).empty());
  EXPECT_TRUE(intersect(Range{5, 9}, Range{0, 3}).empty());
  EXPECT_EQ(intersect(Range{5, 9}, Range{0, 3}).size(), 0);
  EXPECT_EQ(intersect(Range{0, 6}, Range{4, 9}), (Range{4, 6}));
}

TEST(Range, AppendJoinsNeighboursAndDropsEmptyOnes) {
  Ranges ranges;
  append(ranges, {4, 4});
  append(ranges, {4, 6});
  append(ranges, {6, 9});
  append(ranges, {9, 9});
  append(ranges, {12, 13});
  append(ranges, {0, 4});  // touches the first, but stands behind the last
  EXPECT_THAT(ranges, ElementsAre(Range{4, 9}, Range{12, 13}, Range{0, 4}));
  EXPECT_EQ(size(ranges), 10);
}

TEST(Range, UnionHoldsWhatSomeHold) {
  EXPECT_THAT(union_of({{7, 9}, {2, 5}, {3, 4}, {5, 6}, {12, 12}, {8, 10}, {0, 0}}),
              ElementsAre(Range{2, 6}, Range{7, 10}));
  EXPECT_TRUE(union_of({}).empty());
}

/// Disjoint ranges of [0, 30) in random order.
Ranges random_ranges(std::mt19937& random) {
  std::vector<Range> pieces;
  for (Index at = 0; at < 30;) {
    const Index end = std::min<Index>(30, at + 1 + static_cast<Index>(random() % 6));
    if (random() % 2 == 0) pieces.push_back({at, end});
    at = end;
  }
  std::shuffle(pieces.begin(), pieces.end(), random);
  return {pieces.begin(), pieces.end()};
}

TEST(Range, IntersectKeepsTheOrderOfTheFirstList) {
  std::mt19937 random(1);
  for (int round = 0; round < 500; ++round) {
    const Ranges a = random_ranges(random);
    const Ranges b = random_ranges(random);
    std::vector<Index> expected;
    for (const Index i : members(a)) {
      if (place_of(b, i)) expected.push_back(i);
    }
    const Ranges both = intersect(a, b);
    EXPECT_EQ(members(both), expected);
    for (std::size_t n = 0; n < both.size(); ++n) {
      EXPECT_FALSE(both[n].empty());
      if (n > 0) {
        EXPECT_NE(both[n - 1].end, both[n].begin) << "neighbours are joined";
      }
    }
  }
}

TEST(Range, PlaceOfCountsMembersInOrder) {
  std::mt19937 random(2);
  for (int round = 0; round < 100; ++round) {
    const Ranges ranges = random_ranges(random);
    const std::vector<Index> all = members(ranges);
    for (Index i = -1; i <= 31; ++i) {
      const auto at = std::find(all.begin(), all.end(), i);
      const auto expected = at == all.end() ? std::nullopt : std::optional<Index>(at - all.begin());
      EXPECT_EQ(place_of(ranges, i), expected) << i;
    }
  }
}

TEST(Rows, BoundsInsideAndPartAgreeWithTheListOfPositions) {
  for (const Index first : {-7, 0, 5}) {
    for (Index count = 0; count <= 6; ++count) {
      for (Index step = 1; step <= 4; ++step) {
        const dattn::Run run{first, count, step};
        const std::vector<Index> all = members(Runs{run});
        const Range bounds = run.bounds();
        EXPECT_EQ(bounds.empty(), count == 0);
        if (count > 0) {
          EXPECT_EQ(bounds, (Range{all.front(), all.back() + 1}));
        }
        for (Index begin = -10; begin <= 32; ++begin) {
          for (Index end = begin; end <= 32; ++end) {
            const Range inside = run.inside({begin, end});
            EXPECT_LE(inside.begin, inside.end);
            for (Index i = 0; i < count; ++i) {
              const Index position = all[static_cast<std::size_t>(i)];
              EXPECT_EQ(inside.contains(i), begin <= position && position < end)
                  << first << '+' << count << '*' << step << " in " << begin << ' ' << end;
            }
          }
        }
        for (Index begin = 0; begin <= count; ++begin) {
          for (Index end = begin; end <= count; ++end) {
            const auto at = all.begin();
            EXPECT_EQ(members(Runs{run.part({begin, end})}),
                      std::vector<Index>(at + begin, at + end));
          }
        }
      }
    }
  }
}

TEST(Rows, PartOfSeveralRunsTakesRows) {
  const Runs runs{{10, 3, 1}, {0, 0, 1}, {2, 4, 3}, {-5, 1, 9}};
  const std::vector<Index> all = members(runs);
  EXPECT_EQ(size(runs), 8);
  for (Index begin = 0; begin <= 8; ++begin) {
    for (Index end = begin; end <= 8; ++end) {
      const Runs cut = part(runs, {begin, end});
      EXPECT_EQ(members(cut), std::vector<Index>(all.begin() + begin, all.begin() + end));
      for (const auto& run : cut) EXPECT_GT(run.count, 0);
    }
  }
}

}  // namespace
}  // namespace dattn
