#pragma once

// Queries of a grid in patches, and what a patch sees: the folder's own, not for others to include.

#include <optional>
#include <span>
#include <vector>

#include "kernels/attend.hpp"
#include "kernels/live.hpp"

namespace dattn {

/// Keys by their place when those that some rows see are taken one behind the other.
class Places {
 public:
  void clear();
  /// Adds what a row sees: ascending ranges of keys.
  void add(std::span<const Range> spans);
  /// After the last add().
  void number();

  Index size() const { return size_; }
  const std::vector<Range>& keys() const { return keys_; }
  /// Calls `f` with the places of each of the spans, ascending, all of them of a row added before.
  template <class F>
  void each(std::span<const Range> spans, const F& f) const {
    std::size_t at = 0;
    if (!spans.empty() && near_ < keys_.size() && keys_[near_].begin <= spans[0].begin) at = near_;
    for (std::size_t i = 0; i < spans.size(); ++i) {
      while (keys_[at].end < spans[i].end) ++at;
      if (i == 0) near_ = at;
      const Index before = place_[at] - keys_[at].begin;
      f(Range{spans[i].begin + before, spans[i].end + before});
    }
  }

 private:
  std::vector<Range> keys_;   ///< ascending, apart
  std::vector<Index> place_;  ///< of the first of each
  Index size_ = 0;
  mutable std::size_t near_ = 0;  ///< where the row before began
};

/// How the tokens of a grid are numbered, row by row, as far as a mask's spans tell, and in what
/// patches its queries are taken. Positions are counted in steps.
struct Patches {
  Index step = 1;    ///< rows of the block are as many positions apart, or a multiple
  Index row = 1;     ///< tokens of a row of the grid
  Index plane = 0;   ///< of a plane; 0: the grid is flat
  Index width = 1;   ///< tokens of a row that lie in one strip,
  Index height = 1;  ///< and rows of a plane

  /// Queries of a strip follow each other in the order of their positions: some of them in turn are
  /// a patch.
  Index strip(Index position) const;
  Index strips() const;
};

/// Patches under which the computed pairs of a panel, and the keys packed for it, are so many fewer
/// than for queries as they lie that it pays; nothing where the spans of a row in the middle are
/// not as on a grid, or where it would not. `heads` are those of a group, `head` is one of them.
/// Source: tiles of queries on a grid, as in fused neighbourhood attention (Hassani et al. 2024,
/// arXiv 2403.04690); found from the spans of rows here, whatever the mask.
std::optional<Patches> patches_of(const Where& where, const Mask& mask, Index head, Index heads,
                                  const Kernel& kernel);

/// Query lanes that are taken through the keys which they see together, at most.
inline constexpr Index kPatchLanes = 128;

/// attend of groups of as many heads each under one mask (Mask::variant), queries in patches: each
/// takes the keys that it sees in a copy, so that they lie side by side.
/// @pre patches_of(...) gave `patches`; groups are the block's
template <class T>
void attend_patches(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                    const Where& where, const Mask& mask, const Work& work, const Patches& patches,
                    const std::vector<HeadGroup>& groups);

/// Memory in bytes that a thread takes for it, at most.
Index attend_patches_bytes(const Shape& shape, const Kernel& kernel);

}  // namespace dattn
