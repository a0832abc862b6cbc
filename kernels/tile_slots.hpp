#pragma once

// Where tiles of keys lie while queries see them: the folder's own, not for others to include.

#include <cstddef>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/check.hpp"
#include "kernels/range.hpp"

namespace dattn {

/// Each tile is opened when a query first sees it and closed behind the last one that does, so that
/// few slots serve many tiles of which few are seen at a time.
class TileSlots {
 public:
  explicit TileSlots(Index slots) : slots_(slots) {}

  /// The next ones are of `tiles`, and none is open. Where there are slots for all, tile i always
  /// gets slot i.
  void begin(Range tiles) {
    tiles_ = tiles;
    slot_.assign(static_cast<std::size_t>(tiles.size()), kUnseen);
    open_.clear();
    free_.clear();
    if (tiles.size() <= slots_) return;
    free_.resize(static_cast<std::size_t>(slots_));
    std::iota(free_.rbegin(), free_.rend(), Index{0});
  }

  /// The slot of a tile, and whether it is opened now. @pre it was not closed, and one is free
  std::pair<Index, bool> open(Index tile) {
    Index& slot = slot_[static_cast<std::size_t>(tile - tiles_.begin)];
    if (slot >= 0) return {slot, false};
    if (tiles_.size() <= slots_) {
      slot = tile - tiles_.begin;
    } else {
      CHECK(!free_.empty() && slot == kUnseen, tile, slot);
      slot = free_.back();
      free_.pop_back();
    }
    open_.push_back(tile);
    return {slot, true};
  }

  /// Closes the tiles for which done(tile), after last(tile, slot).
  template <class Done, class Last>
  void close_if(const Done& done, const Last& last) {
    std::erase_if(open_, [&](Index tile) {
      if (!done(tile)) return false;
      Index& slot = slot_[static_cast<std::size_t>(tile - tiles_.begin)];
      last(tile, slot);
      if (tiles_.size() > slots_) free_.push_back(slot);
      slot = kClosed;
      return true;
    });
  }

 private:
  static constexpr Index kUnseen = -1;
  static constexpr Index kClosed = -2;

  Index slots_;
  Range tiles_{};
  std::vector<Index> slot_;  ///< of each tile
  std::vector<Index> open_;  ///< tiles, in the order in which they were opened
  std::vector<Index> free_;
};

}  // namespace dattn
