#pragma once

#include <map>
#include <tuple>

#include "kernels/area.hpp"
#include "parallel/kernel_work.hpp"
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

  /// Seconds of an Attend or an AttendBackward of `pairs` allowed pairs: these, what is computed
  /// beside them and what is masked (extra_pairs), and the rows that are read and written; at the
  /// speed of its rank.
  template <class Work>
  double seconds(const Program& program, const Work& work, Index pairs, const Machine& machine) {
    if (pairs == 0) return 0;
    return seconds(program.pass, heads_served(program, work, problem_.shape()),
                   rows(program, work.q), rows(program, work.k), pairs, machine) /
           problem_.speeds().of(program.rank);
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
  /// Bytes of rows that kernels read and write whatever pairs they make: of query rows that see a
  /// key, and of all key rows; the inputs once and the sums twice.
  Index query_bytes(Pass pass, const Ranges& heads, const Ranges& query_rows,
                    const Ranges& key_rows);
  Index key_bytes(Pass pass, const Ranges& heads, const Ranges& key_rows) const;
  /// Of all these heads.
  Extra extra(const Ranges& heads, const Ranges& query_rows, const Ranges& key_rows,
              const Machine& machine);
  double seconds(Pass pass, const Ranges& heads, const Ranges& query_rows, const Ranges& key_rows,
                 Index pairs, const Machine& machine);

  /// The last answer: ranks that differ in their heads only ask for it one after the other.
  template <class Answer>
  struct Last {
    Ranges query_rows, key_rows;
    Answer answer{};
  };
  template <class Answer>
  using LastOf = std::map<Index, Last<Answer>>;  ///< by variant of the mask
  /// visit(answer, how many heads it is for), variant by variant; `find(head)` finds it anew.
  template <class Answer, class Find, class Visit>
  void over_heads(LastOf<Answer>& known, const Ranges& heads, const Ranges& query_rows,
                  const Ranges& key_rows, const Find& find, const Visit& visit);

  const Problem& problem_;
  LastOf<Index> last_;       ///< pairs
  LastOf<Index> last_rows_;  ///< rows that see a key
  LastOf<Extra> last_extra_;
  std::map<std::tuple<Index, Ranges>, RowSpans> rows_;  ///< by (variant, query rows)
  Index rows_bytes_ = 0;
};

}  // namespace dattn
