#pragma once

// The packed keys and values of a forward call: the folder's own, not for others to include.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels/panel.hpp"

namespace dattn {

/// Bytes of packed keys and values that exist at a time, beside those of a single head.
inline constexpr Index kPackBytes = Index{256} << 20;
/// Of one thread, of several heads: what its second-level cache holds, about.
inline constexpr Index kCachedPackBytes = Index{2} << 20;

/// Whether all numbers of some rows are finite. In words of a cache line, which compilers keep in
/// vectors: an exponent of all ones, and only that, carries into the place of the sign.
template <class T>
bool all_finite(View<const T> rows, Index head, Range range) {
  typedef std::uint64_t Words __attribute__((vector_size(64)));
  constexpr std::uint64_t kEach = sizeof(T) == 2 ? 0x0001000100010001U : 0x0000000100000001U;
  constexpr std::uint64_t kExponent = kEach * (sizeof(T) == 2 ? 0x7f80U : 0x7f800000U);
  constexpr std::uint64_t kLowest = kEach * (sizeof(T) == 2 ? 0x0080U : 0x00800000U);
  Words found{};
  const std::size_t size = static_cast<std::size_t>(rows.dim) * sizeof(T);
  for (Index j = range.begin; j < range.end; ++j) {
    const auto* row = reinterpret_cast<const std::byte*>(rows.at(j, head));
    std::size_t done = 0;
    for (; done + sizeof found <= size; done += sizeof found) {
      Words words;
      std::memcpy(&words, row + done, sizeof words);
      found |= (words & kExponent) + kLowest;
    }
    if (done < size) {
      Words words{};
      std::memcpy(&words, row + done, size - done);
      found |= (words & kExponent) + kLowest;
    }
  }
  std::uint64_t all = 0;
  for (std::size_t i = 0; i < sizeof found / sizeof all; ++i) all |= found[i];
  return (all & kEach << (8 * sizeof(T) - 1)) == 0;
}

/// A tile of keys and values as the kernel reads it.
struct PackedTile {
  const std::byte* k;
  const std::byte* v;
  long k_row = 0;  ///< bytes from row to row of keys that are read as they lie
};

/// One call of attend: everything that is the same for all threads.
template <class T>
struct ForwardBlock {
  View<const T> q, k, v;
  const Where& where;
  const Mask& mask;
  const Kernel& kernel;
  BlockRules rules;
  std::vector<HeadGroup> groups;
  Index tiles;  ///< of keys

  Range tile(Index t) const {
    return {t * kernel.tile, std::min<Index>(k.rows, (t + 1) * kernel.tile)};
  }
  Index k_bytes() const { return aligned(kernel.k_size(static_cast<int>(k.dim))); }
  Index v_bytes() const { return aligned(kernel.v_size(static_cast<int>(v.dim))); }

  void pack(const HeadGroup& group, Index t, std::byte* k_to, std::byte* v_to) const {
    prefetch(v, group.value_head, tile(t));
    kernel.pack_k(rows_of(k, group.key_head, tile(t)), k_to);
    if (t + 1 < tiles) prefetch(k, group.key_head, tile(t + 1));
    kernel.pack_v(rows_of(v, group.value_head, tile(t)), v_to);
  }
};

/// Packed tiles of some heads. The first thread that needs a tile packs it: what no query sees is
/// never packed, and what is packed is in the cache of the one who reads it first.
template <class T>
class Packs {
 public:
  /// With fewer places for a head than there are tiles, one thread alone may use it: a tile takes
  /// the place of another.
  Packs(const ForwardBlock<T>& block, Index heads, Index places, CallWorkspace& workspace)
      : block_(block),
        tiles_(block.tiles),
        places_(places),
        memory_(workspace.take<std::byte>(Workspace::Use::k,
                                          heads * places * (block.k_bytes() + block.v_bytes()))),
        states_(static_cast<std::size_t>(heads * places)),
        values_(states_.size()),
        held_(places < tiles_ ? states_.size() : 0, -1) {}

  /// Other heads take the place of those that there were. No thread may be at work.
  void forget() {
    for (auto& state : states_) state.store(State::empty, std::memory_order_relaxed);
    for (auto& values : values_) values.store(Values::unknown, std::memory_order_relaxed);
    std::fill(held_.begin(), held_.end(), -1);
  }

  /// The tile `t` of `group`, whose heads are the `head`-th. Where another thread is packing it,
  /// this one packs others that are needed soon, those before `last` by itself.
  PackedTile need(const HeadGroup& group, Index head, Index t, Index last, Poller& poller) {
    constexpr Index kOthers = 8;  // what the next tiles of queries see first
    const Index end = std::min(tiles_, last + kOthers);
    if (!held_.empty()) make_room(head, t);
    for (Index other = t; !ready(head, t);) {
      while (other < end && !claim(head, other)) ++other;
      if (other < end) {
        block_.pack(group, other, k(head, other), v(head, other));
        state(head, other).store(State::ready, std::memory_order_release);
      } else {
        std::this_thread::yield();  // whoever packs it waits for nobody
      }
      poller.after(static_cast<double>(block_.kernel.tile * (block_.k.dim + block_.v.dim)) * 8);
    }
    return {k(head, t), v(head, t)};
  }

  /// Whether some value of the tile is not finite. Found when first asked, perhaps by two.
  bool strange(const HeadGroup& group, Index head, Index t) {
    auto& values = values_[place(head, t)];
    if (values.load(std::memory_order_relaxed) == Values::unknown) {
      values.store(
          all_finite(block_.v, group.value_head, block_.tile(t)) ? Values::finite : Values::strange,
          std::memory_order_relaxed);
    }
    return values.load(std::memory_order_relaxed) == Values::strange;
  }

 private:
  enum class State : char { empty, taken, ready };
  enum class Values : char { unknown, finite, strange };

  std::size_t place(Index head, Index t) const {
    return static_cast<std::size_t>(head * places_ + t % places_);
  }
  std::atomic<State>& state(Index head, Index t) { return states_[place(head, t)]; }
  void make_room(Index head, Index t) {
    Index& held = held_[place(head, t)];
    if (held == t) return;
    held = t;
    state(head, t).store(State::empty, std::memory_order_relaxed);
    values_[place(head, t)].store(Values::unknown, std::memory_order_relaxed);
  }
  bool ready(Index head, Index t) {
    return state(head, t).load(std::memory_order_acquire) == State::ready;
  }
  bool claim(Index head, Index t) {
    State expected = State::empty;
    return state(head, t).compare_exchange_strong(expected, State::taken,
                                                  std::memory_order_relaxed);
  }
  std::byte* k(Index head, Index t) const {
    return memory_ + static_cast<Index>(place(head, t)) * (block_.k_bytes() + block_.v_bytes());
  }
  std::byte* v(Index head, Index t) const { return k(head, t) + block_.k_bytes(); }

  const ForwardBlock<T>& block_;
  Index tiles_;
  Index places_;  ///< of a head; tile t has place t % places_
  std::byte* memory_;
  std::vector<std::atomic<State>> states_;
  std::vector<std::atomic<Values>> values_;
  std::vector<Index> held_;  ///< the tile at each place, where there are fewer than tiles
};

}  // namespace dattn
