#pragma once

// dQ of one cluster's queries where one thread takes all parts of its keys: the folder's own, not
// for others to include.

#include <cstddef>
#include <vector>

#include "kernels/range.hpp"

namespace dattn {

/// What copies of dQ, one for each part of the keys, add up to, to the bit, without the copies:
/// sums of tiles of queries in the layout in which kernels leave them. Parts come in their order.
class PartSums {
 public:
  /// Floats for so many tiles of queries of `numbers` floats.
  static Index floats(Index tiles, Index numbers) { return 2 * tiles * numbers; }

  PartSums(float* memory, Index tiles, Index numbers)
      : numbers_(numbers),
        sums_(memory),
        open_sums_(memory + tiles * numbers),
        begun_(static_cast<std::size_t>(tiles)),
        open_(begun_.size(), kNone) {}

  /// Adds what a piece of a part found for a tile; `whole`: the part has no other piece.
  void add(Index tile, Index part, bool whole, const float* found) {
    Index& open = open_[static_cast<std::size_t>(tile)];
    if (open != kNone && open != part) close(tile);
    if (whole) {
      add_to_sum(tile, found);
    } else {
      sum(open_sums_ + tile * numbers_, open == part, found);
      open = part;
    }
  }

  /// The sum of a tile, null if nothing was added; the tile is empty then.
  const float* take(Index tile) {
    if (open_[static_cast<std::size_t>(tile)] != kNone) close(tile);
    char& begun = begun_[static_cast<std::size_t>(tile)];
    const bool any = begun != 0;
    begun = 0;
    return any ? sums_ + tile * numbers_ : nullptr;
  }

 private:
  static constexpr Index kNone = -1;

  void close(Index tile) {
    add_to_sum(tile, open_sums_ + tile * numbers_);
    open_[static_cast<std::size_t>(tile)] = kNone;
  }
  void add_to_sum(Index tile, const float* found) {
    char& begun = begun_[static_cast<std::size_t>(tile)];
    sum(sums_ + tile * numbers_, begun != 0, found);
    begun = 1;
  }
  void sum(float* to, bool begun, const float* found) const {
    if (begun) {
      for (Index i = 0; i < numbers_; ++i) to[i] += found[i];
    } else {
      // Not x: a copy was added to zeros, which turns -0 into 0.
      for (Index i = 0; i < numbers_; ++i) to[i] = 0.0f + found[i];
    }
  }

  Index numbers_;
  float* sums_;
  float* open_sums_;         ///< of parts that have come in pieces
  std::vector<char> begun_;  ///< the tiles whose sum holds something
  std::vector<Index> open_;  ///< the part in open_sums_ of each tile
};

}  // namespace dattn
