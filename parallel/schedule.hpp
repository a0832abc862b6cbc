#pragma once

#include <span>
#include <vector>

#include "parallel/block.hpp"
#include "parallel/problem.hpp"

namespace dattn {

/// Some pairs and the rank that computes them: heads `heads` of the query rows `rows`, all of which
/// rank `queries` owns, against the keys that they see among those of rank `keys`.
///
/// `at` is `queries` (the keys come to it, and sums of theirs go back), `keys` (likewise the
/// queries) or a third rank (both). Times are counted in pairs of the fastest rank, as if a rank
/// computed one after the other and messages took no time.
struct Piece {
  int at = 0;
  int queries = 0;
  int keys = 0;
  Range heads;
  Range rows;
  Index pairs = 0;    ///< allowed ones, more than 0
  bool last = false;  ///< after all others of its rank, while the sums of those come home
  Index begin = 0;
  Index takes = 0;  ///< of its rank, at its speed

  Index end() const { return begin + takes; }
};

/// The rows of those keys that `piece` sees, as Blocks of K and V hold them.
Ranges keys_of(const Problem& problem, const Piece& piece);

/// Who computes what, and when. Every allowed pair of the Problem is in one Piece.
class Schedule {
 public:
  /// Puts `pieces` in order: each rank's own keys first, then the piece that it shares with the
  /// nearest rank before it, and so on around, so that in every step all ranks exchange with
  /// another one; and those that are to be last.
  Schedule(const Problem& problem, std::vector<Piece> pieces);

  /// All pieces, those of rank 0 first, each rank's in the order that it computes them.
  const std::vector<Piece>& pieces() const { return pieces_; }
  /// Those that `rank` computes.
  std::span<const Piece> at(int rank) const;
  /// The numbers (places in pieces()) of those that it does not compute, but has queries or keys
  /// of.
  const std::vector<std::size_t>& elsewhere(int rank) const {
    return elsewhere_[static_cast<std::size_t>(rank)];
  }
  /// When the inputs of a piece (by number) are posted: the begin of the piece that its rank
  /// computes `ahead` pieces before it, or of the rank's first.
  Index posted(std::size_t number, int ahead) const;
  /// Pairs of all ranks, and the time of the rank that computes longest.
  Index total() const;
  Index most() const;

 private:
  std::vector<Piece> pieces_;
  std::vector<std::size_t> first_;  ///< piece of each rank, and the end
  std::vector<std::vector<std::size_t>> elsewhere_;
};

/// LightSeq's idea for any mask: ranks compute for their own queries, but what the longest busy
/// have too much of goes to those least busy; to owners of the keys in question while that helps,
/// else to anyone. Pieces are cut where whole ones do not fit, between heads, then between rows.
/// Backward, ranks compute for their own queries or for their own keys, whichever moves fewer
/// bytes. With P ranks about P^2 area counts. Problem::schedule() keeps the answer.
Schedule even_schedule(const Problem& problem, Pass pass);

}  // namespace dattn
