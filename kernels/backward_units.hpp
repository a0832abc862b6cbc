#pragma once

// How the work of attend_backward is cut: the folder's own, not for others to include.

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "kernels/area.hpp"
#include "kernels/backward_block.hpp"

namespace dattn {

/// Units of work that a block is cut into, at most and where it is large enough. Not the number of
/// threads, so that the bits of a result do not depend on it.
inline constexpr Index kUnits = 64;
/// Tiles of keys of a unit, at least.
inline constexpr Index kTilesOfPart = 4;
/// Bytes for dQ by parts of the keys.
inline constexpr Index kPartBytes = Index{1} << 30;

/// One part of the work: a cluster and tiles of keys.
struct Unit {
  Cluster groups;
  Range tiles;
  Index part;
  double area;
};

/// Cuts the keys of each cluster into at most `parts` parts of much the same allowed area.
template <class T>
std::vector<Unit> units_of(const BackwardBlock<T>& block, const std::vector<Cluster>& clusters,
                           Index parts) {
  std::vector<Unit> units;
  // Of the tiles, by variant and order of the keys.
  std::map<std::pair<Index, std::size_t>, std::vector<double>> areas;
  for (const Cluster& cluster : clusters) {
    std::vector<double> until{0};  // area of the tiles before
    for (Index t = 0; t < block.tiles; ++t) {
      double sum = 0;
      for (Index g = cluster.begin; g < cluster.end; ++g) {
        const HeadGroup& group = block.groups[static_cast<std::size_t>(g)];
        const Where& where = block.keys_of(g).where;
        std::vector<double>& known =
            areas[{block.mask.variant(block.head(g)), block.taken_by[static_cast<std::size_t>(g)]}];
        if (static_cast<Index>(known.size()) == t) {
          known.push_back(static_cast<double>(
              area(block.mask, block.head(g), where.queries, part(where.keys, block.tile(t)))));
        }
        sum += static_cast<double>(group.heads.size()) * known[static_cast<std::size_t>(t)];
      }
      until.push_back(until.back() + sum);
    }
    if (until.back() == 0) continue;
    Index begin = 0;
    for (Index p = 0; p < parts && begin < block.tiles; ++p) {
      const double goal = until.back() * static_cast<double>(p + 1) / static_cast<double>(parts);
      Index end = begin + 1;
      while (end < block.tiles && (p + 1 == parts || until[static_cast<std::size_t>(end)] < goal)) {
        ++end;
      }
      units.push_back(
          {cluster,
           {begin, end},
           p,
           until[static_cast<std::size_t>(end)] - until[static_cast<std::size_t>(begin)]});
      begin = end;
    }
  }
  // The longest first, so that no thread starts one when the others are done.
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.area > b.area; });
  return units;
}

/// Into how many parts the keys are cut, each with a copy of dQ of so many numbers: parts add to dQ
/// of the same rows.
inline Index parts_of(Index clusters, Index tiles, Index dq_numbers) {
  const Index copies = kPartBytes / (dq_numbers * static_cast<Index>(sizeof(float)));
  return std::clamp<Index>((kUnits + clusters - 1) / clusters, 1,
                           std::max<Index>(1, std::min(tiles / kTilesOfPart, copies)));
}

/// Fewer parts where rows see little of each: packing a row again for each part must not count.
/// Only keys in an order of their own are seen so, some by all rows.
template <class T>
Index sparse_parts(const BackwardBlock<T>& block, const std::vector<Cluster>& clusters,
                   Index parts) {
  constexpr Index kKeysOfPart = 256;  // that a row sees, in the mean
  constexpr Index kLeastUnits = 16;
  if (parts == 1 || block.taken.size() == 1) return parts;
  double most = 0;  // keys that a row sees
  for (const Cluster& cluster : clusters) {
    const Index pairs =
        area(block.mask, block.head(cluster.begin), block.where.queries, block.where.keys);
    most = std::max(most, static_cast<double>(pairs) / static_cast<double>(block.q.rows));
  }
  const Index least = (kLeastUnits + std::ssize(clusters) - 1) / std::ssize(clusters);
  return std::clamp<Index>(static_cast<Index>(most) / kKeysOfPart, std::min(least, parts), parts);
}

}  // namespace dattn
