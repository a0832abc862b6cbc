// What a Problem finds once for all that ask, against the pairs themselves.
#include "parallel/problem.hpp"

#include <gtest/gtest.h>

namespace dattn {
namespace {

/// Rows of the other side that make a pair with one of `rows`, row by row.
Ranges partners(const Problem& problem, bool of_queries, Index head, Range rows) {
  const Partition& own = of_queries ? problem.queries() : problem.keys();
  const Partition& other = of_queries ? problem.keys() : problem.queries();
  const auto at = [](const Partition& tokens, Index row) {
    return tokens.positions({{row, row + 1}}).front().first;
  };
  Ranges found;
  for (Index row = 0; row < other.tokens(); ++row) {
    bool pair = false;
    for (Index mine = rows.begin; mine < rows.end; ++mine) {
      const Index query = of_queries ? at(own, mine) : at(other, row);
      const Index key = of_queries ? at(other, row) : at(own, mine);
      pair = pair || problem.mask().allows(head, query, key);
    }
    if (pair) append(found, {row, row + 1});
  }
  return found;
}

TEST(Problem, PartnersAreTheRowsWithAPair) {
  const Shape shape{.queries = 70, .keys = 60, .query_heads = 3};
  for (const char* mask : {"causal", "window:5,3@0;neighbor:dims=6x10,window=3x5@1-2",
                           "dilated:4,2,3", "documents:20,1,30,9+causal"}) {
    for (const char* partition : {"contiguous", "zigzag", "striped"}) {
      const Problem problem(shape, parse_mask(mask, shape), line(4), partition);
      for (const bool of_queries : {true, false}) {
        const Index rows = of_queries ? shape.queries : shape.keys;
        for (const Range some : {Range{0, 1}, Range{7, 9}, Range{7, 29}, Range{0, rows}}) {
          for (Index head = 0; head < 3; ++head) {
            const Ranges expected = partners(problem, of_queries, head, some);
            for (int again = 0; again < 2; ++again) {  // found, and known
              EXPECT_EQ(*problem.partners(of_queries, head, some), expected)
                  << mask << ' ' << partition << " head " << head << " rows " << some.begin;
            }
          }
        }
      }
    }
  }
}

TEST(Problem, PairsAreCountedOnceForHeadsThatSeeTheSame) {
  const Shape shape{.queries = 16, .keys = 16, .query_heads = 3};
  const Problem problem(shape, parse_mask("causal@0;full@1-2", shape), line(2), "contiguous");
  int counts = 0;
  const auto count = [&](Index head, const Ranges& queries, const Ranges& keys, Index answer) {
    return problem.counts().pairs.of({problem.mask().variant(head)}, queries, keys, [&] {
      ++counts;
      return answer;
    });
  };
  EXPECT_EQ(count(1, {{0, 4}}, {{0, 8}}, 32), 32);
  EXPECT_EQ(count(2, {{0, 4}}, {{0, 8}}, 0), 32);
  EXPECT_EQ(counts, 1);
  EXPECT_EQ(count(0, {{0, 4}}, {{0, 8}}, 10), 10);
  EXPECT_EQ(count(1, {{0, 8}}, {{0, 4}}, 31), 31);
  EXPECT_EQ(count(1, {{0, 4}}, {{0, 4}, {8, 12}}, 30), 30);
  EXPECT_EQ(counts, 4);
}

}  // namespace
}  // namespace dattn
