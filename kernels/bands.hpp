#pragma once

#include <algorithm>
#include <vector>

#include "kernels/range.hpp"

/// Positions that lie apart, as area.cpp counts them.
namespace dattn {

/// Positions first + i * step + j for i < rounds, j < width: what neighbouring ranks own together
/// when tokens are dealt out one by one. One round is a contiguous piece.
struct Band {
  Index first;
  Index width;
  Index step;
  Index rounds;

  Range bounds() const { return {first, first + (rounds - 1) * step + width}; }
  Index size() const { return rounds * width; }
  /// How many members lie below a position.
  Index below(Index at) const {
    const Index y = at - first;
    if (y <= 0) return 0;
    const Index i = y / step;
    return i >= rounds ? size() : i * width + std::min(y % step, width);
  }
};

/// The same positions in the fewest bands; their order is lost.
std::vector<Band> bands_of(const Runs& runs);

/// Whether each is one piece.
bool dense(const std::vector<Band>& bands);

/// These pieces, as runs.
Runs runs_of(const std::vector<Band>& bands);

/// Bands of disjoint members in chains: within one they follow each other, so that the members
/// below a position are found by halving. Bands that interleave are in chains of their own.
class Members {
 public:
  explicit Members(std::vector<Band> bands);

  /// Each costs a search in below().
  std::size_t chains() const { return chains_.size(); }
  /// How many lie below a position.
  Index below(Index at) const {
    Index sum = 0;
    for (const Chain& chain : chains_) {
      const auto next =
          std::upper_bound(chain.bands.begin(), chain.bands.end(), at,
                           [](Index value, const Band& band) { return value < band.first; });
      if (next == chain.bands.begin()) continue;
      const auto i = static_cast<std::size_t>(next - chain.bands.begin()) - 1;
      sum += chain.before[i] + chain.bands[i].below(at);
    }
    return sum;
  }

 private:
  struct Chain {
    std::vector<Band> bands;
    std::vector<Index> before;  ///< members of the bands before each
  };
  std::vector<Chain> chains_;
};

}  // namespace dattn
