#include "parallel/cache.hpp"

#include <gtest/gtest.h>

#include <numeric>

#include "tests/cases.hpp"

namespace dattn {
namespace {

TEST(Cache, HoldsWhatLaterQueriesMaySeeOfEveryRankAndHead) {
  constexpr Index kLater = 20;
  for (const int ranks : {1, 3, 4}) {
    for (const std::string_view partition : {"contiguous", "zigzag", "striped"}) {
      const Shape shape{37, 37, 6, 3, 2, 4, 5};
      std::vector<std::string> words = masks(shape);
      words.push_back("stream:sink=2,recent=5@0-2;s2:block=4,local=2,stride=3,step=1@3-5");
      for (const std::string& mask : words) {
        const Problem problem(shape, parse_mask(mask, shape, open_blocks), line(ranks), partition);
        const CacheNeed need = cache_need(problem, kLater);
        const auto check = [&](const std::vector<std::vector<Index>>& found, Index heads) {
          for (int r = 0; r < ranks; ++r) {
            for (Index h = 0; h < heads; ++h) {
              Index kept = 0;
              for (const dattn::Run& run : problem.keys().positions({problem.keys().rows(r)})) {
                for (Index i = 0; i < run.count; ++i) {
                  bool seen = false;
                  for (Index q = h * 6 / heads; q < (h + 1) * 6 / heads; ++q) {
                    for (Index at = 37; at < 37 + kLater; ++at) {
                      seen = seen || problem.mask().allows(q, at, run.at(i));
                    }
                  }
                  kept += seen ? 1 : 0;
                }
              }
              EXPECT_EQ(found[static_cast<std::size_t>(r)][static_cast<std::size_t>(h)], kept)
                  << mask << ", " << partition << ", rank " << r << " of " << ranks << ", head "
                  << h;
            }
          }
        };
        check(need.keys, 3);
        check(need.values, 2);
        const auto& keys = need.keys.front();
        const auto& values = need.values.front();
        EXPECT_EQ(need.bytes(problem, 0),
                  4 * (4 * std::accumulate(keys.begin(), keys.end(), 0) +
                       5 * std::accumulate(values.begin(), values.end(), 0)));
      }
    }
  }
}

TEST(Cache, HasAPseudoKeyForWhatItDrops) {
  constexpr Index kLater = 20;
  // Key heads 0 and 1 drop keys, 2 drops none; value head 0 serves key head 0 and half of 1.
  const Shape shape{37, 37, 6, 3, 2, 4, 5};
  const MaskPtr mask = parse_mask("stream:sink=2,recent=5@0-2;window:9,0@3;causal@4-5", shape);
  for (const int ranks : {1, 3, 4, 40}) {
    for (const std::string_view partition : {"contiguous", "zigzag", "striped"}) {
      for (const Type type : {Type::bf16, Type::f8}) {
        const Problem off(shape, mask, line(ranks), partition, type);
        const CacheNeed plain = cache_need(off, kLater);
        for (const Compensate how : {Compensate::head, Compensate::rank}) {
          const CacheNeed need = cache_need(off.compensating(how), kLater);
          EXPECT_EQ(need.keys, plain.keys);
          EXPECT_EQ(need.values, plain.values);
          std::vector<bool> stands(3, false);
          for (int r = 0; r < ranks; ++r) {
            const auto at = static_cast<std::size_t>(r);
            std::vector<Index> pseudo(3, 0);
            for (std::size_t h = 0; h < 3; ++h) {
              const bool drops = need.keys[at][h] < off.keys().rows(r).size();
              if (drops && (how == Compensate::rank || !stands[h])) pseudo[h] = 1;
              stands[h] = stands[h] || drops;
            }
            EXPECT_EQ(need.pseudo_keys[at], pseudo)
                << partition << ", rank " << r << " of " << ranks;
            // Key head 1 is read with either value head.
            const std::vector<Index> values{pseudo[0] + pseudo[1], pseudo[1] + pseudo[2]};
            EXPECT_EQ(need.pseudo_values[at], values) << partition << ", rank " << r;
            const Index numbers =
                (pseudo[0] + pseudo[1] + pseudo[2]) * (4 + 1) + (values[0] + values[1]) * 5;
            EXPECT_EQ(need.bytes(off, r) - plain.bytes(off, r),
                      numbers * (type == Type::f8 ? 8 : 4));
          }
          EXPECT_EQ(stands, (std::vector<bool>{true, true, false}));
        }
      }
    }
  }
}

TEST(Cache, OfShardsIsTheLocalBlocksAndOneInStride) {
  const Index n = 4096;
  const Shape shape{n, n, 8, 8, 8, 4, 4};
  const auto all = [&](const std::string& mask) {
    const Problem problem(shape, parse_mask(mask, shape), line(4), "zigzag");
    const CacheNeed need = cache_need(problem);
    std::vector<Index> sums(8);
    for (const auto& rank : need.keys) {
      for (std::size_t h = 0; h < 8; ++h) sums[h] += rank[h];
    }
    return sums;
  };
  for (const Index kept : all("s2:block=16,local=4,stride=8")) {
    EXPECT_LE(kept, 4 * 16 + n / 8);
    EXPECT_GE(kept, n / 8);
  }
  // Of the last 64 + 256 that the next query sees, itself is not there yet.
  for (const Index kept : all("stream:sink=64,recent=256")) EXPECT_EQ(kept, 64 + 255);
  for (const Index kept : all("causal")) EXPECT_EQ(kept, n);
}

}  // namespace
}  // namespace dattn
