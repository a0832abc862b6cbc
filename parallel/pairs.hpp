#pragma once

#include <map>
#include <tuple>

#include "kernels/area.hpp"
#include "parallel/machine.hpp"
#include "parallel/plan.hpp"

namespace dattn {

/// The query heads that work on these slots is for: those of q whose key and value heads lie in k
/// and v.
Ranges heads_served(const Program& program, SlotId q, SlotId k, SlotId v, const Shape& shape);

/// The same of an Attend or an AttendBackward.
template <class Work>
Ranges heads_served(const Program& program, const Work& work, const Shape& shape) {
  return heads_served(program, work.q, work.k, work.v, shape);
}

/// Counts allowed pairs between Blocks of one Problem, and remembers what makes the next count
/// cheap: a rank attends the same queries to the keys of every other rank.
class PairCounter {
 public:
  explicit PairCounter(const Problem& problem) : problem_(problem) {}

  /// Allowed pairs, summed over the query heads `heads`, between query rows and key rows.
  Index count(const Ranges& heads, const Ranges& query_rows, const Ranges& key_rows);

  /// Bytes of rows that an Attend or an AttendBackward reads and writes, whatever pairs they make:
  /// of query rows that see a key the inputs once and the sums twice, of all key rows likewise.
  template <class Work>
  Index row_bytes(const Program& program, const Work& work) {
    return row_bytes(program.pass, heads_served(program, work, problem_.shape()),
                     rows(program, work.q), rows(program, work.k));
  }

  /// Seconds of such a step, if it computes `pairs`, at the speed of its rank.
  template <class Work>
  double seconds(const Program& program, const Work& work, Index pairs, const Machine& machine) {
    if (pairs == 0) return 0;
    const Shape& shape = problem_.shape();
    const double at_rows =
        machine.rows > 0 ? static_cast<double>(row_bytes(program, work)) / machine.rows : 0;
    const double of_pairs = program.pass == Pass::forward
                                ? shape.flops_per_pair() / machine.rate
                                : shape.backward_flops_per_pair() / machine.backward();
    return (static_cast<double>(pairs) * of_pairs + at_rows) / problem_.speeds().of(program.rank);
  }

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
  /// Rows that see a key, with one head.
  Index seeing(Index head, const Ranges& query_rows, const Ranges& key_rows);
  /// Their spans, for keys that lie apart.
  const RowSpans& spans(Index head, const Ranges& query_rows, const Runs& keys);
  Index row_bytes(Pass pass, const Ranges& heads, const Ranges& query_rows, const Ranges& key_rows);

  /// The last answer: ranks that differ in their heads only ask for it one after the other.
  struct Last {
    Ranges query_rows, key_rows;
    Index count = 0;
  };
  template <class Count>
  Index over_heads(std::map<Index, Last>& known, const Ranges& heads, const Ranges& query_rows,
                   const Ranges& key_rows, const Count& count);

  const Problem& problem_;
  std::map<Index, Last> last_;                          ///< pairs, by variant of the mask
  std::map<Index, Last> last_rows_;                     ///< rows that see a key, likewise
  std::map<std::tuple<Index, Ranges>, RowSpans> rows_;  ///< by (variant, query rows)
  Index rows_bytes_ = 0;
};

}  // namespace dattn
