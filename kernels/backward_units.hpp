#pragma once

// How the work of attend_backward is cut: the folder's own, not for others to include.

#include <omp.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

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

/// Finds what the head group sees of each tile in one pass over the rows: to ask about each tile by
/// itself would look at rows again and again.
template <class T>
std::vector<SeenTile> seen_tiles(const BackwardBlock<T>& block, Index group, const Work& work) {
  constexpr Index kRows = 64;  // at a time
  const Index size = block.kernel.backward_tile;
  const Index blocks = (block.q.rows + kRows - 1) / kRows;
  std::vector<SeenTile> found(static_cast<std::size_t>(block.tiles));
  Caught caught;
  std::mutex mutex;  // of found; OpenMP's would be one of all ranks that are threads
#pragma omp parallel num_threads(work.threads)
  {
    std::vector<SeenTile> own(found.size());
    // By how many more spans a tile is covered whole, or touched, than the one before.
    std::vector<Index> whole(found.size() + 1);
    std::vector<Index> touched(found.size() + 1);
    Poller poller(work.poll, caught, omp_get_thread_num() == 0);
#pragma omp for schedule(dynamic)
    for (Index b = 0; b < blocks; ++b) {
      const Range rows{b * kRows, std::min((b + 1) * kRows, block.q.rows)};
      const LiveRows live(block.keys_of(group).where, block.mask, block.head(group), rows);
      poller.after(0);
      Range tiles{block.tiles, 0};
      for (Index row = rows.begin; row < rows.end;) {
        const std::span<const Range> spans = live.of(row);
        Index same = 1;                                          // rows that share their spans
        const auto shares = [&](std::span<const Range> other) {  // empty ones may lie anywhere
          return other.data() == spans.data() && other.size() == spans.size();
        };
        while (row + same < rows.end && shares(live.of(row + same))) ++same;
        for (const Range span : spans) {
          const auto first = static_cast<std::size_t>(span.begin / size);
          const auto last = static_cast<std::size_t>((span.end - 1) / size);
          const auto begin_of = [&](std::size_t t) { return static_cast<Index>(t) * size; };
          tiles = {std::min(tiles.begin, static_cast<Index>(first)),
                   std::max(tiles.end, static_cast<Index>(last) + 1)};
          ++touched[first];
          --touched[last + 1];
          own[first].pairs += same * (std::min(span.end, begin_of(first + 1)) - span.begin);
          if (first == last) continue;
          own[last].pairs += same * (span.end - begin_of(last));
          whole[first + 1] += same;
          whole[last] -= same;
        }
        row += same;
      }
      Index touching = 0;
      for (Index t = tiles.begin; t < tiles.end; ++t) {
        touching += std::exchange(touched[static_cast<std::size_t>(t)], 0);
        Range& seen = own[static_cast<std::size_t>(t)].rows;
        if (touching > 0) {
          seen = seen.empty()
                     ? rows
                     : Range{std::min(seen.begin, rows.begin), std::max(seen.end, rows.end)};
        }
      }
      if (!tiles.empty()) touched[static_cast<std::size_t>(tiles.end)] = 0;
    }
    {
      const std::lock_guard lock(mutex);
      Index covering = 0;
      for (std::size_t t = 0; t < found.size(); ++t) {
        covering += whole[t];
        SeenTile& tile = found[t];
        tile.pairs += own[t].pairs + covering * size;
        const Range rows = own[t].rows;
        if (rows.empty()) continue;
        tile.rows = tile.rows.empty() ? rows
                                      : Range{std::min(tile.rows.begin, rows.begin),
                                              std::max(tile.rows.end, rows.end)};
      }
    }
  }
  caught.rethrow();
  return found;
}

/// Fills `seen`. @pre take_keys
template <class T>
void look_at_tiles(BackwardBlock<T>& block, const Work& work) {
  for (Index g = 0; g < std::ssize(block.groups); ++g) {
    const auto [at, is_new] = block.seen.try_emplace(
        {block.mask.variant(block.head(g)), block.taken_by[static_cast<std::size_t>(g)]});
    if (is_new) at->second = seen_tiles(block, g, work);
  }
}

/// Cuts the keys of each cluster into at most `parts` parts of much the same allowed area.
template <class T>
std::vector<Unit> units_of(const BackwardBlock<T>& block, const std::vector<Cluster>& clusters,
                           Index parts) {
  std::vector<Unit> units;
  for (const Cluster& cluster : clusters) {
    std::vector<double> until{0};  // area of the tiles before
    for (Index t = 0; t < block.tiles; ++t) {
      double sum = 0;
      for (Index g = cluster.begin; g < cluster.end; ++g) {
        const HeadGroup& group = block.groups[static_cast<std::size_t>(g)];
        sum += static_cast<double>(group.heads.size() *
                                   block.seen_by(g)[static_cast<std::size_t>(t)].pairs);
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
    Index pairs = 0;
    for (const SeenTile& tile : block.seen_by(cluster.begin)) pairs += tile.pairs;
    most = std::max(most, static_cast<double>(pairs) / static_cast<double>(block.q.rows));
  }
  const Index least = (kLeastUnits + std::ssize(clusters) - 1) / std::ssize(clusters);
  return std::clamp<Index>(static_cast<Index>(most) / kKeysOfPart, std::min(least, parts), parts);
}

}  // namespace dattn
