#pragma once

// What the panels of a unit do, tile by tile: the folder's own, not for others to include.

#include <array>
#include <map>
#include <optional>
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
  /// has some. Tiles are of `keys_of_tile` of `keys` keys.
  UnitSteps(const LiveRows& live, std::span<const Index> row_of_lane, const Kernel& kernel,
            Index keys_of_tile, Range tiles, Index keys);

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

/// Steps that one thread keeps for the heads to come that see the same, as far as there is room.
class KnownSteps {
 public:
  /// What a unit takes its steps by: whoever has the same of these takes the same.
  using Unit = std::array<Index, 6>;
  static constexpr Index kBytes = Index{4} << 20;

  /// The unit's steps, which make() makes where they are not known. Valid until the next call.
  template <class Make>
  const UnitSteps& of(const Unit& unit, const Make& make) {
    if (const auto known = known_.find(unit); known != known_.end()) return known->second;
    UnitSteps steps = make();
    const Index more = steps.bytes();
    if (bytes_ + more > kBytes) return fresh_.emplace(std::move(steps));
    bytes_ += more;
    return known_.emplace(unit, std::move(steps)).first->second;
  }
  void forget() {
    known_.clear();
    bytes_ = 0;
  }

 private:
  std::map<Unit, UnitSteps> known_;
  Index bytes_ = 0;
  std::optional<UnitSteps> fresh_;  ///< what there was no room for
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
