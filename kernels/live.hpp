#pragma once

#include <vector>

#include "kernels/attend.hpp"

namespace dattn {

/// Neighbouring query heads that read one key head and one value head under one mask: they share
/// the packs of K and V and lie side by side in the lanes of a panel. All counted from the block's
/// first.
struct HeadGroup {
  Range heads;
  Index key_head = 0;
  Index value_head = 0;

  /// Lanes are numbered row by row, the heads of a row side by side.
  Index row(Index lane) const { return lane / heads.size(); }
  Index head(Index lane) const { return heads.begin + lane % heads.size(); }
};

std::vector<HeadGroup> head_groups(const Where& where, const Mask& mask);

/// Which keys of a block some rows of queries see, in indices of key rows: per row ascending
/// intervals that do not touch. For one thread: it remembers where it was asked last.
class LiveRows {
 public:
  /// The query rows `rows` of the block, for one (global) head, and the key rows `keys`.
  LiveRows(const Where& where, const Mask& mask, Index head, Range rows, Range keys);
  LiveRows(const Where& where, const Mask& mask, Index head, Range rows)
      : LiveRows(where, mask, head, rows, {0, size(where.keys)}) {}

  bool none() const { return spans_.empty(); }
  Range rows() const { return rows_; }
  /// Memory that it holds.
  Index bytes() const {
    return static_cast<Index>(sizeof *this + row_.capacity() * sizeof(Row) +
                              (one_.capacity() + spans_.capacity()) * sizeof(Range));
  }
  /// All that one of the rows sees.
  std::span<const Range> of(Index row) const {
    if (none()) return {};
    const Row& own = row_[static_cast<std::size_t>(row - rows_.begin)];
    return {spans_.data() + own.begin, spans_.data() + own.end};
  }

  /// The smallest Range with every key that some of the query rows `rows` sees.
  Range bounds(Range rows) const;
  /// Keys that every row sees, where no row has two spans; else none.
  Range whole() const;
  /// The first key from `key` on that some row sees; none: the largest Index.
  Index next(Index key) const;

  /// What the query rows of `parts`, all of rows(), see of the keys `tile`. Bit i of Piece::live is
  /// parts[i]. Pieces are cut at multiples of `granule` from tile.begin.
  void pieces(std::span<const Range> parts, Range tile, int granule, std::vector<Piece>& out) const;
  void pieces(Range rows, Range tile, int granule, std::vector<Piece>& out) const {
    pieces({&rows, 1}, tile, granule, out);
  }

  /// The keys of `tile` that `row` sees, counted from tile.begin: as one interval, if they are one
  /// (empty: {0, 0}); else false.
  bool interval(Index row, Range tile, Range& out) const;
  /// Sets `bit` in the words of the keys of `tile` that `row` sees.
  void mark(Index row, Range tile, unsigned bit, unsigned* words) const;

 private:
  struct Row {
    std::size_t begin, end;  ///< in spans_; rows that see the same share them
    mutable std::size_t at;  ///< the span where `from` ended last
  };
  /// The first span of `row` that ends behind `key`, and those after it.
  std::span<const Range> from(Index row, Index key) const;

  Range rows_;
  bool single_ = true;      ///< no row has two spans, and
  std::vector<Range> one_;  ///< these are they, of each row; empty where it has none
  std::vector<Range> spans_;
  std::vector<Row> row_;
};

/// The key rows that some row of some of these sees, ascending.
Ranges keys_seen(std::span<const LiveRows> live);

/// Parts with as many members of `members` each, or one fewer, each as the smallest Range with its
/// own. @pre 1 <= parts <= size(members), which ascend
std::vector<Range> even_cuts(const Ranges& members, Index parts);

/// Intervals or bits of the lanes of a panel, as a kernel wants them.
class LaneMasks {
 public:
  LaneMasks(int lanes, int tile)
      : begin_(static_cast<std::size_t>(lanes)),
        end_(static_cast<std::size_t>(lanes)),
        bits_(static_cast<std::size_t>(tile)) {}

  /// Lane i of the panel belongs to row `row_of_lane[i]`, negative: to none.
  Lanes spell(const LiveRows& live, std::span<const Index> row_of_lane, Range tile);

 private:
  std::vector<int> begin_, end_;
  std::vector<unsigned> bits_;
};

}  // namespace dattn
