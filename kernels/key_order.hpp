#pragma once

// An order of the keys under which rows see few spans: the folder's own, not for others to include.

#include <algorithm>
#include <functional>
#include <map>
#include <vector>

#include "kernels/live.hpp"

namespace dattn {

/// The key rows of a block in another order, as ranges of rows; empty: they are best as they lie.
///
/// Under S2's shards rows see many short spans, which tiles of keys and live pieces fill badly.
/// What the last row sees comes first, the rest behind it: then the last row sees one span, and
/// those before it, whose shard is the same, few. Taken where the rows in between gain by it, too.
std::vector<Range> key_order(const Where& where, const Mask& mask, Index head);

/// The orders of all groups by Mask::variant; nothing where all are best as they lie.
std::map<Index, std::vector<Range>> key_orders(const Where& where, const Mask& mask,
                                               const std::vector<HeadGroup>& groups);

/// The part of a block that is some of its heads, counted from its first.
Where only_heads(const Where& where, Range heads, Range key_heads, Range value_heads);

/// The part of a block that is one head group, its keys in an order (empty: as they lie). The
/// weights of keys are left as they lie.
Where group_in_order(const Where& where, const HeadGroup& group, const std::vector<Range>& order);

/// The rows of the only head of `rows` in an order, densely; polls as it goes.
template <class T>
View<const T> gathered(View<const T> rows, const std::vector<Range>& order, T* to,
                       const std::function<void()>& poll) {
  constexpr Index kAtATime = 1024;  // rows between polls
  T* at = to;
  for (const Range range : order) {
    for (Index first = range.begin; first < range.end; first += kAtATime) {
      const Index end = std::min(first + kAtATime, range.end);
      for (Index row = first; row < end; ++row, at += rows.dim) {
        std::copy_n(rows.at(row, 0), rows.dim, at);
      }
      if (poll) poll();
    }
  }
  return {to, rows.rows, 1, rows.dim};
}

}  // namespace dattn
