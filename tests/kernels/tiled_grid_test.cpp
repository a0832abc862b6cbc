// The numbering of a grid's tokens, against the walk that defines it.
#include "kernels/tiled_grid.hpp"

#include <gtest/gtest.h>

namespace dattn {
namespace {

struct Case {
  std::vector<Index> lengths, tile;
};

/// Tile by tile, row by row in each: the points in the order of their numbers.
std::vector<TiledGrid::Point> walked(const Case& c) {
  TiledGrid::Point length{1, 1, 1};
  TiledGrid::Point tile{1, 1, 1};
  for (std::size_t i = 0; i < c.lengths.size(); ++i) {
    length[3 - c.lengths.size() + i] = c.lengths[i];
    tile[3 - c.lengths.size() + i] = c.tile[i];
  }
  std::vector<TiledGrid::Point> points;
  TiledGrid::Point t{};
  for (t[0] = 0; t[0] < length[0]; t[0] += tile[0]) {
    for (t[1] = 0; t[1] < length[1]; t[1] += tile[1]) {
      for (t[2] = 0; t[2] < length[2]; t[2] += tile[2]) {
        for (Index x = t[0]; x < std::min(t[0] + tile[0], length[0]); ++x) {
          for (Index y = t[1]; y < std::min(t[1] + tile[1], length[1]); ++y) {
            for (Index z = t[2]; z < std::min(t[2] + tile[2], length[2]); ++z) {
              points.push_back({x, y, z});
            }
          }
        }
      }
    }
  }
  return points;
}

TEST(TiledGrid, NumbersAsItIsWalked) {
  const Case cases[] = {{{11}, {3}},      {{7, 5}, {2, 3}},       {{4, 6}, {4, 6}},
                        {{3, 4}, {9, 1}}, {{5, 4, 7}, {2, 3, 4}}, {{1, 1, 1}, {1, 2, 3}}};
  for (const Case& c : cases) {
    const TiledGrid grid(c.lengths, c.tile);
    const auto points = walked(c);
    ASSERT_EQ(grid.size(), std::ssize(points));
    for (Index n = 0; n < grid.size(); ++n) {
      const auto& p = points[static_cast<std::size_t>(n)];
      EXPECT_EQ(grid.point(n), p);
      EXPECT_EQ(grid.position(p), n);
      EXPECT_EQ(grid.of_row_major(grid.row_major(p)), p);
    }
    // One tile is the whole grid: then both numbers are the same.
    const TiledGrid plain(c.lengths, c.lengths);
    for (Index n = 0; n < grid.size(); ++n) EXPECT_EQ(plain.row_major(plain.point(n)), n);
  }
}

TEST(TiledGrid, BoxHoldsAllOfARange) {
  const std::vector<Index> lengths{5, 4, 7};
  const std::vector<Index> tile{2, 3, 4};
  const TiledGrid grid(lengths, tile);
  for (Index begin = 0; begin < grid.size(); begin += 3) {
    for (Index end = begin + 1; end <= grid.size(); end += 5) {
      const auto box = grid.box({begin, end});
      for (Index n = begin; n < end; ++n) {
        for (std::size_t d = 0; d < 3; ++d) EXPECT_TRUE(box[d].contains(grid.point(n)[d]));
      }
    }
  }
}

}  // namespace
}  // namespace dattn
