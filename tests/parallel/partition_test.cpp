#include "parallel/partition.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <set>

#include "kernels/area.hpp"

namespace dattn {
namespace {

const PartitionKind& kind_named(std::string_view name) {
  const auto kinds = partition_kinds();
  return *std::find_if(kinds.begin(), kinds.end(),
                       [&](const PartitionKind& kind) { return kind.name == name; });
}

Shape square(Index n, Index heads = 1) { return {n, n, heads, heads, heads, 1, 1}; }

std::vector<Index> listed_positions(const Runs& runs) {
  std::vector<Index> out;
  for (const Run& run : runs) {
    for (Index i = 0; i < run.count; ++i) out.push_back(run.at(i));
  }
  return out;
}

TEST(Partition, TurnsGiveEachRankItsShareOfAnyStretch) {
  const Speeds uneven(std::vector<double>{1, 0.5, 0.25, 1, 0.001});  // the last gets the least step
  const std::vector<double> weights{16, 8, 4, 16, 1};
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  constexpr Index kTokens = 500;
  const Partition p(turns_by_speed(kTokens, 5, uneven));
  std::vector<std::vector<Index>> before;  // of each rank: its tokens before each token
  std::vector<Index> all(kTokens, 0);
  for (int r = 0; r < 5; ++r) {
    std::vector<Index> own(kTokens, 0);
    for (const Index token : listed_positions(p.positions({p.rows(r)}))) {
      ++own[static_cast<std::size_t>(token)];
      ++all[static_cast<std::size_t>(token)];
    }
    before.push_back({0});
    for (const Index has : own) before.back().push_back(before.back().back() + has);
  }
  EXPECT_EQ(all, std::vector<Index>(kTokens, 1));
  for (std::size_t r = 0; r < 5; ++r) {
    const double share = weights[r] / sum;
    for (std::size_t begin = 0; begin < kTokens; begin += 7) {
      for (std::size_t end = begin; end <= kTokens; end += 11) {
        const auto got = static_cast<double>(before[r][end] - before[r][begin]);
        EXPECT_LE(std::abs(got - share * static_cast<double>(end - begin)), 2.0)
            << r << " " << begin;
      }
    }
  }
  EXPECT_EQ(turns_by_speed(9, 3, Speeds(std::vector<double>{0.5, 1, 0.5})),
            (std::vector<Runs>{{{1, 2, 4}}, {{0, 3, 4}, {3, 2, 4}}, {{2, 2, 4}}}));
  for (const Speeds& equal : {Speeds(), Speeds(std::vector<double>{3, 3, 3})}) {
    EXPECT_EQ(turns_by_speed(20, 3, equal),
              (std::vector<Runs>{{{0, 7, 3}}, {{1, 7, 3}}, {{2, 6, 3}}}));
  }
}

TEST(Partition, AgreesWithBruteForce) {
  for (const PartitionKind& kind : partition_kinds()) {
    for (int ranks = 1; ranks <= 16; ++ranks) {
      for (const Index n : std::set<Index>{0, 1, 2, 7, ranks - 1, ranks, ranks + 1, 101}) {
        SCOPED_TRACE(std::string(kind.name) + " " + std::to_string(n) + " tokens, " +
                     std::to_string(ranks) + " ranks");
        const Index first = n % 3 - 1;  // positions may start anywhere
        const auto mask = parse_mask("causal", square(std::max<Index>(n, 1)));
        const Partition p(kind.deal(n, ranks, square(n), *mask, {}), first);
        ASSERT_EQ(p.ranks(), ranks);
        ASSERT_EQ(p.tokens(), n);

        std::vector<Index> position;  // by row
        std::vector<int> owner;
        for (int r = 0; r < ranks; ++r) {
          ASSERT_EQ(p.rows(r).begin, static_cast<Index>(position.size()));
          const auto own = listed_positions(p.positions({p.rows(r)}));
          ASSERT_EQ(static_cast<Index>(own.size()), p.rows(r).size());
          EXPECT_TRUE(std::is_sorted(own.begin(), own.end()));
          position.insert(position.end(), own.begin(), own.end());
          owner.resize(position.size(), r);
        }
        auto sorted = position;
        std::sort(sorted.begin(), sorted.end());
        std::vector<Index> all(static_cast<std::size_t>(n));
        std::iota(all.begin(), all.end(), first);
        EXPECT_EQ(sorted, all);

        for (Index row = 0; row < n; ++row) {
          EXPECT_EQ(p.owner(row), owner[static_cast<std::size_t>(row)]);
        }
        // Rows across ranks, in two pieces and out of order.
        const Ranges rows{{n / 2, n}, {0, n / 3}};
        std::vector<Index> expected;
        for (const Range r : rows) {
          for (Index i = r.begin; i < r.end; ++i) {
            expected.push_back(position[static_cast<std::size_t>(i)]);
          }
        }
        EXPECT_EQ(listed_positions(p.positions(rows)), expected);
        if (kind.name == "contiguous" && n > 0) {
          EXPECT_EQ(p.positions({{0, n}}).size(), 1U);
        }
        Ranges many;  // from before the first position to behind the last one
        for (Index at = first - 4; at < first + n + 4; at += 5)
          many.push_back({at, at + at % 2 + 2});
        const Ranges few{{first, first + n / 4}, {first + n / 2, first + n / 2 + 3}};
        for (const Ranges& wanted : {few, many, Ranges{}}) {
          for (int r = 0; r < ranks; ++r) {
            Ranges right;
            for (Index i = p.rows(r).begin; i < p.rows(r).end; ++i) {
              const Index at = position[static_cast<std::size_t>(i)];
              const bool is_wanted = std::any_of(wanted.begin(), wanted.end(),
                                                 [&](Range some) { return some.contains(at); });
              if (is_wanted) append(right, {i, i + 1});
            }
            EXPECT_EQ(p.rows_at(r, wanted), right);
            EXPECT_EQ(p.has_at(r, wanted), !right.empty());
          }
        }
      }
    }
  }
}

TEST(Partition, EvenKindsDifferByOneTokenPerPiece) {
  const auto mask = parse_mask("causal", square(101));
  for (const auto& [name, most] :
       {std::pair{"contiguous", 1}, std::pair{"striped", 1}, std::pair{"zigzag", 2}}) {
    for (int ranks = 1; ranks <= 16; ++ranks) {
      const Partition p(kind_named(name).deal(101, ranks, square(101), *mask, {}));
      for (int r = 0; r < ranks; ++r) {
        EXPECT_LE(std::abs(p.rows(r).size() * ranks - 101), most * ranks) << name << ranks;
      }
    }
  }
}

/// The most loaded rank's allowed area against the mean.
double unevenness(std::string_view partition, const std::string& words, const Shape& shape,
                  int ranks) {
  const auto mask = parse_mask(words, shape);
  const Partition p(kind_named(partition).deal(shape.queries, ranks, shape, *mask, {}),
                    shape.first_query());
  double most = 0;
  double sum = 0;
  for (int r = 0; r < ranks; ++r) {
    double own = 0;
    for (const auto& [head, times] : variants(*mask, {0, shape.query_heads})) {
      own += static_cast<double>(times *
                                 area(*mask, head, p.positions({p.rows(r)}), {{0, shape.keys, 1}}));
    }
    most = std::max(most, own);
    sum += own;
  }
  return most * ranks / sum;
}

TEST(Partition, BalancedIsEvenWhereZigzagIsNot) {
  const Shape shape = square(8192, 4);
  const std::string uneven = "documents:5000,1200,700,600,400,150,100,42";
  for (const std::string& mask : {uneven, uneven + "+causal"}) {
    EXPECT_LE(unevenness("balanced", mask, shape, 4), 1.05) << mask;
    EXPECT_GT(unevenness("zigzag", mask, shape, 4), 1.05) << mask;
  }
}

TEST(Partition, BalancedIsEven) {
  const Shape shape = square(4096, 4);
  for (const std::string mask :
       {"full", "causal", "window:256,0", "window:100,300", "prefix:1000", "window:64,0/sink:16",
        "documents:3000,1000,96+causal", "causal@0-1;window:128,0@2-3",
        "documents:4000,96@0-0;causal@1-3"}) {
    for (const int ranks : {1, 2, 3, 4, 7, 8, 16}) {
      EXPECT_LE(unevenness("balanced", mask, shape, ranks), 1.05) << mask << ", P " << ranks;
    }
  }
  EXPECT_LE(unevenness("balanced", "causal", {1000, 5000, 1, 1, 1, 1, 1}, 7), 1.05);
}

TEST(Partition, BalancedDealsEqualBlocksAndTheSameEveryTime) {
  const Shape shape = square(5003);
  const auto mask = parse_mask("documents:4000,1000,3+causal", shape);
  const auto& kind = kind_named("balanced");
  for (const int ranks : {2, 3, 4, 8, 13}) {
    const Partition p(kind.deal(5003, ranks, shape, *mask, {}));
    Index least = 5003;
    Index most = 0;
    for (int r = 0; r < ranks; ++r) {
      least = std::min(least, p.rows(r).size());
      most = std::max(most, p.rows(r).size());
    }
    // As many blocks on every rank; blocks are two a rank at the coarsest, and differ by one token.
    EXPECT_LE(most - least, 64) << ranks;
    EXPECT_EQ(kind.deal(5003, ranks, shape, *mask, {}), kind.deal(5003, ranks, shape, *mask, {}));
  }
}

}  // namespace
}  // namespace dattn
