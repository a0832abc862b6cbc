#include "kernels/tiled_grid.hpp"

#include <algorithm>

namespace dattn {

TiledGrid::TiledGrid(std::span<const Index> lengths, std::span<const Index> tile) {
  std::copy(lengths.begin(), lengths.end(), length_.end() - std::ssize(lengths));
  std::copy(tile.begin(), tile.end(), tile_.end() - std::ssize(tile));
  for (std::size_t d = kMostDims; d-- > 0;) {
    tile_[d] = std::min(tile_[d], length_[d]);
    behind_[d] = size_;
    size_ *= length_[d];
    for (Index x = 0; x < length_[d]; ++x) {
      const Index begin = x / tile_[d] * tile_[d];
      of_[d].push_back({begin, std::min(begin + tile_[d], length_[d])});
    }
  }
}

TiledGrid::Point TiledGrid::point(Index position) const {
  Point begin{};
  Point extent{};
  Index before = 1;  // tokens of the tile along the axes done
  for (std::size_t d = 0; d < kMostDims; ++d) {
    const Index layer = before * tile_[d] * behind_[d];
    begin[d] = position / layer * tile_[d];
    position %= layer;
    extent[d] = tile_of(d, begin[d]).size();
    before *= extent[d];
  }
  for (std::size_t d = kMostDims; d-- > 0;) {
    begin[d] += position % extent[d];
    position /= extent[d];
  }
  return begin;
}

Index TiledGrid::position(const Point& p) const {
  Index at = 0;
  Index inside = 0;
  Index before = 1;
  for (std::size_t d = 0; d < kMostDims; ++d) {
    const Range own = tile_of(d, p[d]);
    at += before * own.begin * behind_[d];
    before *= own.size();
    inside = inside * own.size() + (p[d] - own.begin);
  }
  return at + inside;
}

TiledGrid::Box TiledGrid::box(Range positions) const {
  Box found{};
  Index before = 1;
  for (std::size_t d = 0; d < kMostDims; ++d) {
    const Index layer = before * tile_[d] * behind_[d];
    const Range tiles{positions.begin / layer, (positions.end - 1) / layer + 1};
    found[d] = {tiles.begin * tile_[d], std::min(length_[d], tiles.end * tile_[d])};
    if (tiles.size() > 1) {
      for (++d; d < kMostDims; ++d) found[d] = {0, length_[d]};
      return found;
    }
    positions = {positions.begin - tiles.begin * layer, positions.end - tiles.begin * layer};
    before *= found[d].size();
  }
  // Of one tile: its rows.
  for (std::size_t d = 0; d < kMostDims; ++d) {
    before /= found[d].size();  // tokens of one coordinate
    const Range rows{positions.begin / before, (positions.end - 1) / before + 1};
    found[d] = {found[d].begin + rows.begin, found[d].begin + rows.end};
    if (rows.size() > 1) break;
    positions = {positions.begin - rows.begin * before, positions.end - rows.begin * before};
  }
  return found;
}

}  // namespace dattn
