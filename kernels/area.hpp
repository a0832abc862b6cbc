#pragma once

#include <optional>

#include "kernels/mask.hpp"

namespace dattn {

/// A query position and a key position.
struct Pair {
  Index query = 0;
  Index key = 0;
};

/// The exact number of allowed (query, key) pairs of one head between the rows at positions
/// `queries` and those at `keys`, by descent on `cover`.
Index area(const Mask& mask, Index head, const Runs& queries, const Runs& keys);

/// The same for many sets of keys against one set of queries, kept as its rows' spans, each once
/// for all neighbouring rows that see it: what strided keys need, where tiles of neighbouring
/// positions say little.
class RowSpans {
 public:
  /// `step` is the step of the keys that will be asked about; others are answered, more slowly.
  RowSpans(const Mask& mask, Index head, const Runs& queries, Range keys, Index step);

  Index area(const Runs& keys) const;
  /// How many of the rows see one of `keys`.
  Index seeing(const Runs& keys) const;
  /// What it takes, about.
  Index bytes() const {
    return std::ssize(rows_) * static_cast<Index>(2 * sizeof(Edge) + sizeof(Range));
  }

 private:
  /// A position as `step` sees it: quotient * step + rest.
  struct Edge {
    Index quotient;
    Index rest;
  };
  Index position(const Edge& e) const { return e.quotient * step_ + e.rest; }

  Edge edge(Index position) const { return {position / step_, position % step_}; }

  Index step_;
  std::vector<Edge> begins_;  ///< of spans
  std::vector<Edge> ends_;
  std::vector<Range> rows_;  ///< that see each, counted over all queries
  /// What is left of the edges for keys that have every round up to the last of them: ends less
  /// begins, each as often as rows have it, of their quotients the sum, by rest the number; of a
  /// step too long to count by rest none.
  Index quotients_ = 0;
  std::vector<Index> rests_;
  Index last_ = 0;  ///< the last edge
};

/// Whether every run has step 1, or the runs fill each other's gaps so that they may as well.
bool dense(const Runs& runs);

/// Some allowed pair of that rectangle, or nothing when it has none.
std::optional<Pair> allowed_pair(const Mask& mask, Index head, const Runs& queries,
                                 const Runs& keys);

/// The keys of [0, keys) that at least one of the rows at `queries` sees, as ascending Ranges.
Ranges keys_seen(const Mask& mask, Index head, const Runs& queries, Index keys);

/// The positions `queries` that see at least one of those at `keys`, as ascending Ranges.
Ranges queries_seeing(const Mask& mask, Index head, Range queries, const Runs& keys);

/// How many of the rows at `queries` see at least one of those at `keys`.
Index rows_seeing(const Mask& mask, Index head, const Runs& queries, const Runs& keys);

/// The heads of `heads` by what they see: one head of each variant, and how many heads it stands
/// for.
std::vector<std::pair<Index, Index>> variants(const Mask& mask, Range heads);

}  // namespace dattn
