#include "parallel/pairs.hpp"

#include <algorithm>

namespace dattn {

namespace {

/// Spans are kept until they take this much: masks of many spans a row would fill the memory.
constexpr Index kMostRowsBytes = Index{512} << 20;

}  // namespace

template <class Count>
Index PairCounter::over_heads(std::map<Index, Last>& known, const Ranges& heads,
                              const Ranges& query_rows, const Ranges& key_rows,
                              const Count& count) {
  Index sum = 0;
  for (const Range range : heads) {
    for (const auto& [head, times] : variants(problem_.mask(), range)) {
      Last& last = known[problem_.mask().variant(head)];
      if (last.query_rows != query_rows || last.key_rows != key_rows) {
        last = {query_rows, key_rows, count(head)};
      }
      sum += times * last.count;
    }
  }
  return sum;
}

Index PairCounter::count(const Ranges& heads, const Ranges& query_rows, const Ranges& key_rows) {
  return over_heads(last_, heads, query_rows, key_rows,
                    [&](Index head) { return count(head, query_rows, key_rows); });
}

Index PairCounter::count(Index head, const Ranges& query_rows, const Ranges& key_rows) {
  const Runs keys = problem_.keys().positions(key_rows);
  return dense(keys) ? area(problem_.mask(), head, problem_.queries().positions(query_rows), keys)
                     : spans(head, query_rows, keys).area(keys);
}

Index PairCounter::seeing(Index head, const Ranges& query_rows, const Ranges& key_rows) {
  const Runs keys = problem_.keys().positions(key_rows);
  return dense(keys)
             ? rows_seeing(problem_.mask(), head, problem_.queries().positions(query_rows), keys)
             : spans(head, query_rows, keys).seeing(keys);
}

const RowSpans& PairCounter::spans(Index head, const Ranges& query_rows, const Runs& keys) {
  const std::tuple key(problem_.mask().variant(head), query_rows);
  auto found = rows_.find(key);
  if (found == rows_.end()) {
    const Index step = std::max_element(keys.begin(), keys.end(), [](const Run& a, const Run& b) {
                         return a.step < b.step;
                       })->step;
    if (rows_bytes_ > kMostRowsBytes) {
      rows_.clear();
      rows_bytes_ = 0;
    }
    found = rows_
                .try_emplace(key, problem_.mask(), head, problem_.queries().positions(query_rows),
                             Range{0, problem_.shape().keys}, step)
                .first;
    rows_bytes_ += found->second.bytes();
  }
  return found->second;
}

Index PairCounter::row_bytes(Pass pass, const Ranges& heads, const Ranges& query_rows,
                             const Ranges& key_rows) {
  const Shape& shape = problem_.shape();
  const auto per_row = [&](std::span<const Kind> kinds) {
    Index bytes = 0;
    for (const Kind kind : kinds) bytes += record_bytes(kind, shape, problem_.type());
    return bytes;
  };
  const Index rows =  // that see a key, of all heads
      over_heads(last_rows_, heads, query_rows, key_rows,
                 [&](Index head) { return seeing(head, query_rows, key_rows); });
  const Side queries = query_side(pass);
  Index bytes = rows * (per_row(queries.inputs) + 2 * per_row(queries.sums));
  const Side keys = key_side(pass);
  for (const auto& [kinds, times] : {std::pair{keys.inputs, 1}, std::pair{keys.sums, 2}}) {
    for (const Kind kind : kinds) {
      bytes += times * size(key_rows) * size(heads_touched(kind, heads, shape)) *
               record_bytes(kind, shape, problem_.type());
    }
  }
  return bytes;
}

Ranges heads_served(const Program& program, SlotId q, SlotId k, SlotId v, const Shape& shape) {
  const auto heads = [&](SlotId s) -> const Ranges& {
    return program.slots[static_cast<std::size_t>(s)].block.heads;
  };
  return intersect(heads(q), intersect(query_heads_of(Kind::K, heads(k), shape),
                                       query_heads_of(Kind::V, heads(v), shape)));
}

}  // namespace dattn
