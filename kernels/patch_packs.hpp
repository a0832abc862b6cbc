#pragma once

// One call of attend_patches and its packed keys and values: the folder's own, not for others to
// include.

#include <algorithm>
#include <mutex>
#include <vector>

#include "kernels/packs.hpp"
#include "kernels/patches.hpp"

namespace dattn {

/// Of a key in the order of strips.
struct Place {
  int tile;
  int at;    ///< in the tile
  int same;  ///< rows from this one on that follow each other there, too
};

/// One call: everything that is the same for all threads.
template <class T>
struct PatchBlock {
  View<const T> q, k, v;
  View<float> out;
  const Where& where;
  const Mask& mask;
  const Score& score;
  const Kernel& kernel;
  const std::vector<HeadGroup>& groups;
  StripOrder queries, keys;
  std::vector<Index> positions;    ///< of the rows of Q
  std::vector<Place> places = {};  ///< of the rows of K

  Index tiles() const { return (k.rows + kernel.tile - 1) / kernel.tile; }
  /// As places in the order of the keys.
  Range tile(Index t) const {
    return {t * kernel.tile, std::min<Index>(k.rows, (t + 1) * kernel.tile)};
  }
  Index k_bytes() const { return aligned(kernel.k_size(d_qk())); }
  Index v_bytes() const { return aligned(kernel.v_size(d_v())); }
  Index head() const { return where.query_heads.begin + groups.front().heads.begin; }
  Index heads() const { return groups.front().heads.size(); }
  int d_qk() const { return static_cast<int>(q.dim); }
  int d_v() const { return static_cast<int>(v.dim); }

  /// Appends the key rows that the query at a position sees.
  void spans(Index position, std::vector<Range>& found, std::vector<Range>& scratch) const {
    const std::size_t begin = found.size();
    Index before = 0;
    for (const Run& run : where.keys) {
      scratch.clear();
      if (run.step == 1) {
        mask.spans(head(), position, run.bounds(), scratch);
        for (const Range s : scratch) {
          append(found, begin, {before + s.begin - run.first, before + s.end - run.first});
        }
      } else {
        mask.members(head(), position, run, scratch);
        for (const Range s : scratch) append(found, begin, {before + s.begin, before + s.end});
      }
      before += run.count;
    }
  }
};

/// Packed tiles of some groups' keys, strip by strip. The first thread that needs one packs it.
template <class T>
class PatchPacks {
 public:
  PatchPacks(const PatchBlock<T>& block, Index groups, CallWorkspace& workspace)
      : block_(block),
        tiles_(block.tiles()),
        memory_(workspace.take<std::byte>(Workspace::Use::k,
                                          groups * tiles_ * (block.k_bytes() + block.v_bytes()))),
        once_(static_cast<std::size_t>(groups * tiles_)),
        finite_(once_.size()) {}

  struct Tile {
    const std::byte* k;
    const std::byte* v;
    bool finite;  ///< all values are
  };
  /// The tile `t` of `group`, the `place`-th of these. `rows` is memory for a tile's.
  Tile need(const HeadGroup& group, Index place, Index t, T* rows) {
    const Index at = place * tiles_ + t;
    std::byte* k = memory_ + at * (block_.k_bytes() + block_.v_bytes());
    std::byte* v = k + block_.k_bytes();
    char& finite = finite_[static_cast<std::size_t>(at)];
    std::call_once(once_[static_cast<std::size_t>(at)], [&] {
      gather(block_.k, group.key_head, t, rows);
      block_.kernel.pack_k(dense(t, rows, block_.d_qk()), k);
      gather(block_.v, group.value_head, t, rows);
      block_.kernel.pack_v(dense(t, rows, block_.d_v()), v);
      const Index count = block_.tile(t).size();
      finite = all_finite(View<const T>{rows, count, 1, block_.v.dim}, 0, {0, count}) ? 1 : 0;
    });
    return {k, v, finite != 0};
  }

 private:
  Rows dense(Index t, const T* rows, int dim) const {
    return {rows, dim, static_cast<int>(block_.tile(t).size()), dim, element_of<T>()};
  }
  void gather(View<const T> from, Index head, Index t, T* to) const {
    const Range tile = block_.tile(t);
    const Index* row = block_.keys.rows.data();
    for (Index i = tile.begin; i < tile.end; ++i) prefetch(from.at(row[i], head), from.dim);
    for (Index i = tile.begin; i < tile.end; ++i, to += from.dim) {
      std::copy_n(from.at(row[i], head), from.dim, to);
    }
  }

  const PatchBlock<T>& block_;
  Index tiles_;
  std::byte* memory_;
  std::vector<std::once_flag> once_;
  std::vector<char> finite_;
};

/// Fills `places`.
template <class T>
void find_places(PatchBlock<T>& block) {
  std::vector<Place>& places = block.places;
  places.resize(block.keys.rows.size());
  for (Index t = 0; t < block.tiles(); ++t) {
    const Range tile = block.tile(t);
    for (Index i = tile.begin; i < tile.end; ++i) {
      const Index row = block.keys.rows[static_cast<std::size_t>(i)];
      places[static_cast<std::size_t>(row)] = {static_cast<int>(t),
                                               static_cast<int>(i - tile.begin), 1};
    }
  }
  for (std::size_t row = places.size(); row-- > 1;) {
    Place& before = places[row - 1];
    const Place& here = places[row];
    if (before.tile == here.tile && before.at + 1 == here.at) before.same = here.same + 1;
  }
}

}  // namespace dattn
