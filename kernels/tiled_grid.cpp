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
  if (row_by_row()) return of_row_major(position);
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

void TiledGrid::cut(std::size_t level, Box box, Index tokens, Range positions, Boxes& found) const {
  while (positions.size() < tokens) {
    const std::size_t d = level % kMostDims;
    const Index unit = level < kMostDims ? tile_[d] : 1;
    ++level;
    const Range along = box[d];
    if (along.size() <= unit) continue;
    const auto narrowed = [&](Index first, Index end) {
      Box part = box;
      part[d] = {along.begin + first * unit, std::min(along.begin + end * unit, along.end)};
      return part;
    };
    const Index layer = tokens / along.size() * unit;
    const Index first = positions.begin / layer;
    const Index last = (positions.end - 1) / layer;
    const Index left = positions.end - last * layer;  // in the last one
    const Index tokens_of_last = std::min(layer, tokens - last * layer);
    if (first == last) {
      box = narrowed(first, first + 1);
      tokens = tokens_of_last;
      positions = {positions.begin - first * layer, left};
      continue;
    }
    const bool cuts_first = positions.begin > first * layer;
    const bool cuts_last = left < tokens_of_last;
    if (cuts_first) {
      cut(level, narrowed(first, first + 1), layer, {positions.begin - first * layer, layer},
          found);
    }
    const Range whole{first + (cuts_first ? 1 : 0), last + (cuts_last ? 0 : 1)};
    if (!whole.empty()) found.add(narrowed(whole.begin, whole.end));
    if (cuts_last) cut(level, narrowed(last, last + 1), tokens_of_last, {0, left}, found);
    return;
  }
  found.add(box);
}

TiledGrid::Boxes TiledGrid::boxes(Range positions) const {
  Boxes found;
  if (positions.empty()) return found;
  Box all;
  for (std::size_t d = 0; d < kMostDims; ++d) all[d] = {0, length_[d]};
  cut(0, all, size_, positions, found);
  return found;
}

TiledGrid::Box TiledGrid::box(Range positions) const {
  const Boxes parts = boxes(positions);
  Box found = *parts.begin();
  for (const Box& part : parts) {
    for (std::size_t d = 0; d < kMostDims; ++d) {
      found[d] = {std::min(found[d].begin, part[d].begin), std::max(found[d].end, part[d].end)};
    }
  }
  return found;
}

}  // namespace dattn
