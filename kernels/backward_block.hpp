#pragma once

// One call of attend_backward and its packed keys and values: the folder's own, not for others to
// include.

#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/key_order.hpp"
#include "kernels/panel.hpp"

namespace dattn {

/// Keys of a block in the order in which head groups take them.
struct TakenKeys {
  /// `order` is empty where keys are taken as they lie.
  TakenKeys(const Where& block, const std::vector<Range>& order, const Score& score,
            const Kernel& kernel)
      : where(block), rules(score, where, kernel) {
    if (order.empty()) return;
    where.keys.clear();
    for (const Range range : order) {
      const Runs runs = part(block.keys, range);
      where.keys.insert(where.keys.end(), runs.begin(), runs.end());
      for (Index row = range.begin; row < range.end; ++row) rows.push_back(row);
    }
    const View<const float>& from = block.key_weights;
    if (from.data == nullptr) return;
    for (const Index row : rows) {
      for (Index h = 0; h < from.heads; ++h) weights.push_back(*from.at(row, h));
    }
    where.key_weights = {weights.data(), from.rows, from.heads, 1};
  }
  TakenKeys(const TakenKeys&) = delete;

  Index row(Index key) const { return rows.empty() ? key : rows[static_cast<std::size_t>(key)]; }

  Where where;  ///< the block with its keys in this order
  BlockRules rules;
  std::vector<Index> rows;  ///< of the block, of each key in this order; empty: the same
  std::vector<float> weights;
};

/// What a head sees of a tile of keys.
struct SeenTile {
  Index pairs = 0;  ///< allowed ones
  Range rows;       ///< query rows with all that see some of it, and perhaps others
};

template <class T>
struct BackwardBlock {
  View<const T> q, k, v, d_o;
  View<const float> lse, delta;
  View<float> dq, dk, dv;
  const Where& where;
  const Mask& mask;
  const Kernel& kernel;
  Normalizer normalizer;
  float scale;
  std::vector<HeadGroup> groups;
  Index tiles;                                    ///< of keys
  std::vector<std::unique_ptr<TakenKeys>> taken;  ///< different ones
  std::vector<std::size_t> taken_by;              ///< of each group, in `taken`
  /// By variant of the mask and place in `taken`: of all tiles.
  std::map<std::pair<Index, std::size_t>, std::vector<SeenTile>> seen;

  Index head(Index group) const {
    return where.query_heads.begin + groups[static_cast<std::size_t>(group)].heads.begin;
  }
  const TakenKeys& keys_of(Index group) const {
    return *taken[taken_by[static_cast<std::size_t>(group)]];
  }
  const std::vector<SeenTile>& seen_by(Index group) const {
    return seen.at({mask.variant(head(group)), taken_by[static_cast<std::size_t>(group)]});
  }
  Range tile(Index t) const {
    return {t * kernel.backward_tile, std::min<Index>(k.rows, (t + 1) * kernel.backward_tile)};
  }
  Range keys(Range of_tiles) const {
    return {tile(of_tiles.begin).begin, tile(of_tiles.end - 1).end};
  }
  int d_qk() const { return static_cast<int>(q.dim); }
  int d_v() const { return static_cast<int>(v.dim); }
  Index k_bytes() const { return aligned(kernel.k_backward_size(d_qk())); }
  Index v_bytes() const { return aligned(kernel.v_backward_size(d_v())); }
};

/// Groups [groups.begin, groups.end) add to the same gradients of K or V and belong to one thread.
using Cluster = Range;

inline std::vector<Cluster> clusters_of(const std::vector<HeadGroup>& groups) {
  std::vector<Cluster> out;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const auto i = static_cast<Index>(g);
    if (g > 0 && (groups[g].key_head == groups[g - 1].key_head ||
                  groups[g].value_head == groups[g - 1].value_head)) {
      out.back().end = i + 1;
    } else {
      out.push_back({i, i + 1});
    }
  }
  return out;
}

/// Fills `taken`: an order of its own for each variant that gains by one. Groups of a cluster take
/// their keys in one order, or parts of the keys would share gradients.
template <class T>
void take_keys(BackwardBlock<T>& block, const std::vector<Cluster>& clusters, const Score& score) {
  const auto add = [&](const std::vector<Range>& order) {
    block.taken.push_back(std::make_unique<TakenKeys>(block.where, order, score, block.kernel));
    return block.taken.size() - 1;
  };
  add({});
  block.taken_by.assign(block.groups.size(), 0);
  const auto orders = key_orders(block.where, block.mask, block.groups);
  if (orders.empty()) return;
  std::map<Index, std::size_t> known;  // by variant
  for (const Cluster& cluster : clusters) {
    const Index variant = block.mask.variant(block.head(cluster.begin));
    bool one = true;
    for (Index g = cluster.begin; g < cluster.end; ++g) {
      one = one && block.mask.variant(block.head(g)) == variant;
    }
    const std::vector<Range>& order = orders.at(variant);
    if (!one || order.empty()) continue;
    const auto [at, is_new] = known.try_emplace(variant);
    if (is_new) at->second = add(order);
    for (Index g = cluster.begin; g < cluster.end; ++g) {
      block.taken_by[static_cast<std::size_t>(g)] = at->second;
    }
  }
}

/// Packed tiles of the key head and the value head that one thread is at, packed when first needed:
/// what no query sees is never packed, and what is packed is still in the cache when it is read.
template <class T>
class BackwardPacks {
 public:
  /// Of one thread, for so many tiles at a time; aligned.
  static Index bytes(const BackwardBlock<T>& block, Index tiles) {
    return tiles * (block.k_bytes() + block.v_bytes());
  }
  BackwardPacks(const BackwardBlock<T>& block, Index tiles, std::byte* memory)
      : block_(block),
        k_{memory, block.k_bytes(), std::vector<Index>(static_cast<std::size_t>(tiles), kNone)},
        v_{memory + tiles * block.k_bytes(), block.v_bytes(), k_.tile} {}

  /// The next ones are of these tiles and of a group's heads.
  void begin(Range tiles, const HeadGroup& group, const TakenKeys& keys) {
    for (auto& [side, head] : {std::pair{&k_, group.key_head}, std::pair{&v_, group.value_head}}) {
      if (side->head == head && keys_ == &keys) continue;
      std::fill(side->tile.begin(), side->tile.end(), kNone);
      side->head = head;
    }
    tiles_ = tiles;
    keys_ = &keys;
  }
  /// Tile t, kept in a slot that it has for itself until all that it is needed for is done.
  const std::byte* k(Index t, Index slot) {
    return pack(k_, block_.k, t, slot, block_.kernel.pack_k_backward);
  }
  const std::byte* v(Index t, Index slot) {
    return pack(v_, block_.v, t, slot, block_.kernel.pack_v_backward);
  }

 private:
  static constexpr Index kNone = -1;
  struct Side {
    std::byte* memory;
    Index bytes;              ///< of a tile
    std::vector<Index> tile;  ///< in each slot
    Index head = kNone;
  };

  std::byte* pack(Side& side, View<const T> view, Index t, Index slot,
                  void (*fill)(const Rows&, void*)) {
    std::byte* to = side.memory + slot * side.bytes;
    Index& held = side.tile[static_cast<std::size_t>(slot)];
    if (held != t) {
      fill(rows(view, side.head, t), to);
      if (t + 1 < tiles_.end && keys_->rows.empty()) prefetch(view, side.head, block_.tile(t + 1));
    }
    held = t;
    return to;
  }
  /// The rows of a tile: where they lie, or gathered.
  Rows rows(View<const T> view, Index head, Index t) {
    const Range tile = block_.tile(t);
    if (keys_->rows.empty()) return rows_of(view, head, tile);
    gathered_.resize(static_cast<std::size_t>(tile.size() * view.dim));
    for (Index i = 0; i < tile.size(); ++i) {
      std::copy_n(view.at(keys_->row(tile.begin + i), head), view.dim,
                  gathered_.data() + i * view.dim);
    }
    return {gathered_.data(), view.dim, static_cast<int>(tile.size()), static_cast<int>(view.dim),
            element_of<T>()};
  }

  const BackwardBlock<T>& block_;
  Side k_, v_;
  Range tiles_;
  const TakenKeys* keys_ = nullptr;
  std::vector<T> gathered_;
};

}  // namespace dattn
