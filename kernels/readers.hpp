#pragma once

// Keys by how many queries read them: the folder's own, not for others to include.

#include <vector>

#include "kernels/live.hpp"

namespace dattn {

/// Rows of queries, of a block that has more, for which keys are looked at by their readers.
constexpr Index kMostRowsByReaders = 4096;

/// Some rows of a block's queries and of its keys.
struct Part {
  Range rows;
  Range keys;
};

/// The part of a block that is these rows.
Where where_of(const Where& where, const Part& some);

/// The keys of a block by their readers: a panel of queries goes through those that many lanes
/// see; the others, of which each is seen by no more lanes than decode takes, are read as they lie
/// by those few. Such are the suffixes of a batch.
struct Readers {
  std::vector<Range> many;
  /// By ranges of keys; the parts of one have rows that differ.
  std::vector<std::vector<Part>> few;
};

/// As above where some long range has few readers; `few` is empty where one way serves all, and
/// where heads differ or queries are so many that it would not pay to look.
Readers readers_of(const Where& where, const Mask& mask, const std::vector<HeadGroup>& groups);

}  // namespace dattn
