#pragma once

#include <array>
#include <span>
#include <vector>

#include "kernels/range.hpp"

namespace dattn {

/// A grid of one to three dimensions whose tokens are numbered tile by tile and row by row in each,
/// tiles at the far edges being smaller. With one tile of the whole grid that is row by row.
class TiledGrid {
 public:
  static constexpr std::size_t kMostDims = 3;
  /// Coordinates; axes that there are not stand in front and have length 1.
  using Point = std::array<Index, kMostDims>;
  using Box = std::array<Range, kMostDims>;

  /// @pre one to three lengths, and as many of a tile, all at least 1; the product is an Index
  TiledGrid(std::span<const Index> lengths, std::span<const Index> tile);

  Index size() const { return size_; }
  Index length(std::size_t axis) const { return length_[axis]; }
  Index tile(std::size_t axis) const { return tile_[axis]; }
  /// Whether it is one tile: numbers are those of row_major().
  bool row_by_row() const { return tile_ == length_; }
  /// The coordinates of x's tile.
  Range tile_of(std::size_t axis, Index x) const { return of_[axis][static_cast<std::size_t>(x)]; }

  Point point(Index position) const;
  Index position(const Point& p) const;
  /// Where the token stands when the grid is numbered row by row, and back.
  Index row_major(const Point& p) const { return (p[0] * length_[1] + p[1]) * length_[2] + p[2]; }
  Point of_row_major(Index position) const {
    return {position / length_[2] / length_[1], position / length_[2] % length_[1],
            position % length_[2]};
  }
  /// The tokens at neighbouring positions, box by box: at most so many. They begin inside one tile
  /// or coordinate of an axis, go on with whole ones, and end inside one.
  struct Boxes {
    std::array<Box, 4 * kMostDims> part;
    std::size_t count = 0;

    void add(const Box& box) { part[count++] = box; }
    const Box* begin() const { return part.data(); }
    const Box* end() const { return part.data() + count; }
  };
  Boxes boxes(Range positions) const;
  /// The smallest box that holds them. @pre there are some
  Box box(Range positions) const;

 private:
  /// Adds the tokens `positions` of a box that is whole tiles down to `level`: axis by axis of
  /// tiles, then of coordinates in one. `tokens` and positions are counted in the box.
  void cut(std::size_t level, Box box, Index tokens, Range positions, Boxes& found) const;

  Point length_{1, 1, 1};
  Point tile_{1, 1, 1};
  Point behind_{};  ///< tokens of one coordinate along the axes behind
  std::array<std::vector<Range>, kMostDims> of_;
  Index size_ = 1;
};

}  // namespace dattn
