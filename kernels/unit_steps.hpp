#pragma once

// What the panels of a unit of forward do, tile by tile: the folder's own, not for others to
// include.

#include <array>
#include <span>
#include <vector>

#include "kernels/live.hpp"

namespace dattn {

/// Steps of the panels of some query lanes through tiles of keys, in the order in which they are
/// taken. Of lanes and tiles alone: heads that see the same take the same steps.
class UnitSteps {
 public:
  /// One panel against what it sees of one tile.
  struct Step {
    Index panel;
    std::span<const Piece> pieces;
    Lanes allowed;  ///< with null pointers where no piece is masked
    bool masked;
  };
  /// Tiles that panels meet in the same way: `count` steps from `first` on, of one tile; 0: every
  /// panel sees all keys of all these tiles.
  struct Run {
    Range tiles;
    std::size_t first;
    std::size_t count;
  };

  UnitSteps() = default;
  /// Lane i of panel p belongs to row `row_of_lane[p * lanes + i]`, negative: to none; each panel
  /// has some. Tiles are of kernel.tile of `keys` keys.
  UnitSteps(const LiveRows& live, std::span<const Index> row_of_lane, const Kernel& kernel,
            Range tiles, Index keys);

  std::span<const Run> runs() const { return runs_; }
  Step step(std::size_t at) const;
  /// Memory that it holds.
  Index bytes() const;

 private:
  struct Held {
    Index panel;
    std::size_t piece, pieces;
    std::size_t lane;  ///< in bounds_: first keys of each lane, then last ones
    std::size_t bits;  ///< in bits_
    bool masked, has_bits;
  };

  std::size_t lanes_ = 0;
  std::vector<Run> runs_;
  std::vector<Held> steps_;
  std::vector<Piece> pieces_;
  std::vector<int> bounds_;
  std::vector<unsigned> bits_;
};

/// Sets the words of the keys of a tile that a lane of a panel may see.
inline void mark_allowed(const Lanes& allowed, std::size_t lane, std::vector<unsigned>& words) {
  for (std::size_t key = 0; key < words.size(); ++key) {
    const auto j = static_cast<int>(key);
    words[key] = allowed.bits != nullptr
                     ? allowed.bits[key] >> lane & 1u
                     : static_cast<unsigned>(allowed.begin[lane] <= j && j < allowed.end[lane]);
  }
}

}  // namespace dattn
