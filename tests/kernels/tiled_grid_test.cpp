// The numbering of a grid's tokens, against the walk that defines it.
#include "kernels/tiled_grid.hpp"

#include <gtest/gtest.h>

#include <algorithm>

namespace dattn {
namespace {

struct Case {
  std::vector<Index> lengths, tile;
};

const Case kCases[] = {{{11}, {3}},      {{7, 5}, {2, 3}},       {{4, 6}, {4, 6}},
                       {{3, 4}, {9, 1}}, {{5, 4, 7}, {2, 3, 4}}, {{1, 1, 1}, {1, 2, 3}}};

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
  for (const Case& c : kCases) {
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

TEST(TiledGrid, BoxesHoldARangeAndNothingElse) {
  for (const Case& c : kCases) {
    const TiledGrid grid(c.lengths, c.tile);
    const std::vector<TiledGrid::Point> points = walked(c);
    for (Index begin = 0; begin < grid.size(); ++begin) {
      for (Index end = begin + 1; end <= grid.size(); ++end) {
        const auto boxes = grid.boxes({begin, end});
        ASSERT_LE(boxes.count, boxes.part.size());
        Index tokens = 0;
        for (const auto& box : boxes) tokens += box[0].size() * box[1].size() * box[2].size();
        ASSERT_EQ(tokens, end - begin) << begin;
        auto hull = *boxes.begin();
        for (Index n = begin; n < end; ++n) {
          const auto& p = points[static_cast<std::size_t>(n)];
          const auto holds = [&](const TiledGrid::Box& box) {
            return box[0].contains(p[0]) && box[1].contains(p[1]) && box[2].contains(p[2]);
          };
          ASSERT_EQ(std::count_if(boxes.begin(), boxes.end(), holds), 1) << begin << ' ' << end;
          for (std::size_t d = 0; d < 3; ++d) {
            hull[d] = {std::min(hull[d].begin, p[d]), std::max(hull[d].end, p[d] + 1)};
          }
        }
        ASSERT_EQ(grid.box({begin, end}), hull);
      }
    }
  }
  const std::vector<Index> length{4};
  EXPECT_EQ(TiledGrid(length, length).boxes({2, 2}).count, 0u);
}

}  // namespace
}  // namespace dattn
