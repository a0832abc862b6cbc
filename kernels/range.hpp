#pragma once

#include <algorithm>
#include <boost/container/small_vector.hpp>
#include <compare>
#include <cstdint>
#include <optional>
#include <vector>

namespace dattn {

/// Every count, extent and index of dattn: signed, 64 bits.
using Index = std::int64_t;

/// The half-open range [begin, end).
struct Range {
  Index begin = 0;
  Index end = 0;

  Index size() const { return end - begin; }
  bool empty() const { return end <= begin; }
  bool contains(Index i) const { return begin <= i && i < end; }
  bool contains(Range other) const {
    return other.empty() || (begin <= other.begin && other.end <= end);
  }
  friend auto operator<=>(const Range&, const Range&) = default;
};

/// What two ranges share; empty ranges come back as {x, x}.
inline Range intersect(Range a, Range b) {
  const Index begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}

/// Disjoint, non-empty Ranges in a meaningful order (the order of rows in memory). Nearly always
/// one.
using Ranges = boost::container::small_vector<Range, 1>;

/// Sum of the sizes.
Index size(const Ranges& ranges);

/// The parts of `a` that `b` holds too, in the order of `a`, neighbours joined.
Ranges intersect(const Ranges& a, const Ranges& b);

/// Adds `next` behind `ranges`, joined to the last one where it continues it; drops empty ones.
void append(Ranges& ranges, Range next);

/// The same where those before `first` are somebody else's: what Mask::spans appends.
void append(std::vector<Range>& ranges, std::size_t first, Range next);

/// All that some of these hold, ascending.
Ranges union_of(std::vector<Range> ranges);

/// Where index `i` stands when the members of `ranges` are counted in order; nothing if absent.
std::optional<Index> place_of(const Ranges& ranges, Index i);

/// Part `part` of [0, count) cut into `parts` pieces whose sizes differ by one at most.
inline Range even_part(Index count, Index parts, Index part) {
  // floor(part * count / parts) without overflow for any count.
  const auto edge = [&](Index p) { return count / parts * p + count % parts * p / parts; };
  return {edge(part), edge(part + 1)};
}

/// Positions first, first + step, ... of `count` consecutive rows of a block. @pre step >= 1
struct Run {
  Index first = 0;
  Index count = 0;
  Index step = 1;

  Index at(Index i) const { return first + i * step; }
  /// The smallest Range with every position in it; empty for an empty run.
  Range bounds() const { return {first, count == 0 ? first : at(count - 1) + 1}; }
  /// The members [begin, end) of the run, counted from 0.
  Run part(Range r) const { return {at(r.begin), r.size(), step}; }
  /// Which members, counted from 0, lie in `positions`.
  Range inside(Range positions) const {
    const auto up = [&](Index x) {  // members before position x
      return x <= first ? Index{0} : std::min(count, (x - first + step - 1) / step);
    };
    const Index begin = up(positions.begin);
    return {begin, std::max(begin, up(positions.end))};
  }
  friend auto operator<=>(const Run&, const Run&) = default;
};

/// The positions of the rows of a block, in the order of its rows.
using Runs = std::vector<Run>;

/// Number of rows.
Index size(const Runs& runs);

/// The positions of the rows `rows` (counted from 0) of a block.
Runs part(const Runs& runs, Range rows);

}  // namespace dattn
