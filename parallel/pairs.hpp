#pragma once

#include <map>
#include <tuple>

#include "kernels/area.hpp"
#include "parallel/plan.hpp"

namespace dattn {

/// The query heads that work on these slots is for: those of q whose key and value heads lie in k
/// and v.
Range heads_served(const Program& program, SlotId q, SlotId k, SlotId v, const Shape& shape);

/// The same of an Attend or an AttendBackward.
template <class Work>
Range heads_served(const Program& program, const Work& work, const Shape& shape) {
  return heads_served(program, work.q, work.k, work.v, shape);
}

/// Counts allowed pairs between Blocks of one Problem, and remembers what makes the next count
/// cheap: a rank attends the same queries to the keys of every other rank.
class PairCounter {
 public:
  explicit PairCounter(const Problem& problem) : problem_(problem) {}

  /// Allowed pairs, summed over the query heads `heads`, between query rows and key rows.
  Index count(Range heads, const Ranges& query_rows, const Ranges& key_rows);

  /// Allowed pairs that an Attend or an AttendBackward of `program` computes.
  template <class Work>
  Index count(const Program& program, const Work& work) {
    return count(heads_served(program, work, problem_.shape()), rows(program, work.q),
                 rows(program, work.k));
  }

 private:
  static const Ranges& rows(const Program& program, SlotId s) {
    return program.slots[static_cast<std::size_t>(s)].block.rows;
  }
  /// Allowed pairs of one head.
  Index count(Index head, const Ranges& query_rows, const Ranges& key_rows);

  /// The last answer: ranks that differ in their heads only ask for it one after the other.
  struct Last {
    Ranges query_rows, key_rows;
    Index pairs = 0;
  };
  const Problem& problem_;
  std::map<Index, Last> last_;                          ///< by variant of the mask
  std::map<std::tuple<Index, Ranges>, RowSpans> rows_;  ///< by (variant, query rows)
};

}  // namespace dattn
