#pragma once

// How the work of attend is cut: the folder's own, not for others to include.

#include <algorithm>
#include <array>
#include <map>
#include <vector>

#include "kernels/area.hpp"
#include "kernels/attend_block.hpp"
#include "kernels/packs.hpp"

namespace dattn {

/// Units of work that a block is cut into at least, where it is large enough: what many threads
/// need. Not the number of threads, so that the bits of a result do not depend on it.
inline constexpr Index kForwardUnits = 64;

/// One part of the work: a tile of queries of one group of heads, and a part of the keys.
struct ForwardUnit {
  Index group;
  Range lanes;  ///< of the group
  Range tiles;  ///< of keys
  Index part;   ///< which of the parts of its tile of queries
  double area;
};

/// What some rows see, head by head, of heads that see different pairs.
template <class T>
std::vector<LiveRows> live_of_variants(const ForwardBlock<T>& block, Range rows) {
  std::vector<LiveRows> live;
  std::vector<Index> variants;
  for (const HeadGroup& group : block.groups) {
    const Index head = block.where.query_heads.begin + group.heads.begin;
    const Index variant = block.mask.variant(head);
    if (std::find(variants.begin(), variants.end(), variant) != variants.end()) continue;
    variants.push_back(variant);
    live.emplace_back(block.where, block.mask, head, rows);
  }
  return live;
}

/// The most of what some rows here and there see.
struct RowSees {
  Index keys = 0;
  Index span = 0;  ///< from the first key to the last
};

template <class T>
RowSees row_sees(const ForwardBlock<T>& block) {
  constexpr Index kRows = 16;
  RowSees most;
  for (Index i = 0; i < kRows; ++i) {
    const Range rows = even_part(block.q.rows, kRows, i);
    if (rows.empty()) continue;
    for (const LiveRows& live : live_of_variants(block, {rows.end - 1, rows.end})) {
      const std::span<const Range> spans = live.of(rows.end - 1);
      if (spans.empty()) continue;
      Index keys = 0;
      for (const Range span : spans) keys += span.size();
      most.keys = std::max(most.keys, keys);
      most.span = std::max(most.span, spans.back().end - spans.front().begin);
    }
  }
  return most;
}

/// The tiles of keys that few rows see, as those of a sequence see few of a batch's; of many rows
/// all tiles.
template <class T>
Ranges tiles_seen(const ForwardBlock<T>& block) {
  constexpr Index kFewRows = 16;
  if (block.q.rows > kFewRows) return {{0, block.tiles}};
  const std::vector<LiveRows> live = live_of_variants(block, {0, block.q.rows});
  const Index tile = block.kernel.tile;
  std::vector<Range> tiles;
  for (const Range keys : keys_seen(live)) {
    tiles.push_back({keys.begin / tile, (keys.end + tile - 1) / tile});
  }
  return union_of(std::move(tiles));
}

/// The tiles of keys of each part that the keys are cut into; none where nothing is seen.
template <class T>
std::vector<Range> tiles_of_parts(const ForwardBlock<T>& block) {
  // Tiles that a row sees of a part, at least: what a part costs to merge must not count.
  constexpr Index kTilesOfPart = 4;
  const Ranges seen = tiles_seen(block);
  if (seen.empty()) return {};
  Index tiles = 0;  // of queries, in all groups
  for (const HeadGroup& group : block.groups) {
    tiles += (block.q.rows * group.heads.size() + kLanes - 1) / kLanes;
  }
  Index parts = 1;
  if (tiles < kForwardUnits && size(seen) >= 2 * kTilesOfPart) {
    // Rows that see few keys see few parts: the others' records would be cleared and merged for
    // nothing.
    const Index tile = block.kernel.tile;
    const Index most = std::max<Index>(1, (row_sees(block).keys + tile - 1) / tile / kTilesOfPart);
    parts = std::clamp<Index>((kForwardUnits + tiles - 1) / tiles, 1, most);
  }
  return even_cuts(seen, parts);
}

/// Packs that exist at a time: of how many heads, and of how many tiles of each.
struct PackPlaces {
  Index heads;
  Index tiles;
};

/// Many threads need many units, and so many heads. One takes as many as its cache holds of what a
/// tile of queries sees, for its rows of all heads lie side by side in memory; packs that have left
/// the cache come back slower than they were made.
template <class T>
PackPlaces pack_places(const ForwardBlock<T>& block, int threads) {
  const Index tile_bytes = block.k_bytes() + block.v_bytes();
  const auto groups = std::ssize(block.groups);
  if (threads > 1) {
    return {std::clamp<Index>(kPackBytes / (block.tiles * tile_bytes), 1, groups), block.tiles};
  }
  const Index rows = std::min(block.q.rows, kLanes / block.groups.front().heads.size() + 1);
  const Index seen = (row_sees(block).span + rows) / block.kernel.tile + 2;
  const Index heads = std::min(kCachedPackBytes / (seen * tile_bytes), groups);
  if (heads <= 1) return {1, block.tiles};
  return {heads, std::min(seen, block.tiles)};
}

/// The units of the groups [groups.begin, groups.end), for one thread those of the same rows side
/// by side; `parts` are the tiles of each part of the keys.
template <class T>
std::vector<ForwardUnit> units_of(const ForwardBlock<T>& block, Range groups,
                                  const std::vector<Range>& parts, int threads) {
  const bool by_area = threads > 1;
  std::vector<ForwardUnit> units;
  // Groups of as many heads under the same mask have units of the same area.
  std::map<std::array<Index, 4>, double> areas;
  for (Index g = groups.begin; g < groups.end; ++g) {
    const HeadGroup& group = block.groups[static_cast<std::size_t>(g)];
    const Index head = block.where.query_heads.begin + group.heads.begin;
    const Index lanes = block.q.rows * group.heads.size();
    for (Index first = 0; first < lanes; first += kLanes) {
      for (Index part = 0; part < std::ssize(parts); ++part) {
        ForwardUnit unit{g,
                         {first, std::min(first + kLanes, lanes)},
                         parts[static_cast<std::size_t>(part)],
                         part,
                         0};
        if (by_area) {
          const auto [known, is_new] =
              areas.try_emplace({block.mask.variant(head), group.heads.size(), first, part}, 0.0);
          if (is_new) {
            const Range rows{group.row(unit.lanes.begin), group.row(unit.lanes.end - 1) + 1};
            known->second = static_cast<double>(
                area(block.mask, head, dattn::part(block.where.queries, rows),
                     dattn::part(block.where.keys, {block.tile(unit.tiles.begin).begin,
                                                    block.tile(unit.tiles.end - 1).end})));
          }
          unit.area = known->second;
        }
        units.push_back(unit);
      }
    }
  }
  // The longest first, so that no thread starts one when the others are done.
  std::stable_sort(units.begin(), units.end(), [&](const ForwardUnit& a, const ForwardUnit& b) {
    return by_area ? a.area > b.area : a.lanes.begin < b.lanes.begin;
  });
  return units;
}

}  // namespace dattn
