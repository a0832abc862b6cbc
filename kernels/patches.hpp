#pragma once

// Queries of a grid in patches, and what a patch sees: the folder's own, not for others to include.

#include <optional>
#include <vector>

#include "kernels/attend.hpp"
#include "kernels/live.hpp"

namespace dattn {

/// How the tokens of a grid are numbered, row by row, as far as a mask's spans tell, and in what
/// patches its queries are taken. Positions are counted in steps.
struct Patches {
  Index step = 1;    ///< rows of the block are as many positions apart, or a multiple
  Index row = 1;     ///< tokens of a row of the grid
  Index plane = 0;   ///< of a plane; 0: the grid is flat
  Index width = 1;   ///< tokens of a row that lie in one strip,
  Index height = 1;  ///< and rows of a plane
  /// Strips of keys are as large and begin so many tokens and rows earlier: where those begin that
  /// a strip of queries sees.
  Index earlier = 0;
  Index above = 0;

  /// Queries of a strip follow each other in the order of their positions: some of them in turn are
  /// a patch. What a patch sees of a strip of keys is nearly one span then.
  Index query_strip(Index position) const { return strip(position, 0, 0); }
  Index key_strip(Index position) const { return strip(position, earlier, above); }
  /// More than any strip's number.
  Index strips() const;

 private:
  Index strip(Index position, Index right, Index down) const;
};

/// Rows in the order of their strips, those of a strip in the order in which they lie, and where in
/// it each strip ends.
struct StripOrder {
  std::vector<Index> rows;
  std::vector<Index> ends;
};
StripOrder order_of_queries(const Runs& queries, const Patches& patches);
StripOrder order_of_keys(const Runs& keys, const Patches& patches);

/// Patches under which a panel computes so many fewer pairs than of queries as they lie that it
/// pays; nothing where the spans of a row in the middle are not as on a grid, or where it would
/// not. `heads` are those of a group, `head` is one of them.
/// Source: tiles of queries on a grid, as in fused neighbourhood attention (Hassani et al. 2024,
/// arXiv 2403.04690); found from the spans of rows here, whatever the mask.
std::optional<Patches> patches_of(const Where& where, const Mask& mask, Index head, Index heads,
                                  const Kernel& kernel);

/// Query lanes that go through the keys together, at most.
inline constexpr Index kPatchLanes = 128;

/// attend of groups of as many heads each under one mask (Mask::variant), queries and packed keys
/// strip by strip.
/// @pre patches_of(...) gave `patches`; groups are the block's
template <class T>
void attend_patches(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                    const Where& where, const Mask& mask, const Work& work, const Patches& patches,
                    const std::vector<HeadGroup>& groups);

/// Memory in bytes that it takes beside packs as attend_block's, at most.
Index attend_patches_bytes(const Shape& shape, Index queries, Index keys, int threads,
                           const Kernel& kernel);

}  // namespace dattn
