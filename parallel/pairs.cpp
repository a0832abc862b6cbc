#include "parallel/pairs.hpp"

#include <algorithm>

namespace dattn {

Index PairCounter::count(Range heads, const Ranges& query_rows, const Ranges& key_rows) {
  Index sum = 0;
  for (const auto& [head, times] : variants(problem_.mask(), heads)) {
    Last& last = last_[problem_.mask().variant(head)];
    if (last.query_rows != query_rows || last.key_rows != key_rows) {
      last = {query_rows, key_rows, count(head, query_rows, key_rows)};
    }
    sum += times * last.pairs;
  }
  return sum;
}

Index PairCounter::count(Index head, const Ranges& query_rows, const Ranges& key_rows) {
  const Mask& mask = problem_.mask();
  const Runs keys = problem_.keys().positions(key_rows);
  if (dense(keys)) return area(mask, head, problem_.queries().positions(query_rows), keys);
  const std::tuple key(mask.variant(head), query_rows);
  auto found = rows_.find(key);
  if (found == rows_.end()) {
    const Index step = std::max_element(keys.begin(), keys.end(), [](const Run& a, const Run& b) {
                         return a.step < b.step;
                       })->step;
    const RowSpans rows(mask, head, problem_.queries().positions(query_rows),
                        {0, problem_.shape().keys}, step);
    found = rows_.emplace(key, rows).first;
  }
  return found->second.area(keys);
}

Range heads_served(const Program& program, SlotId q, SlotId k, SlotId v, const Shape& shape) {
  const auto heads = [&](SlotId s) {
    return program.slots[static_cast<std::size_t>(s)].block.heads;
  };
  return intersect(heads(q), intersect(query_heads_of(Kind::K, heads(k), shape),
                                       query_heads_of(Kind::V, heads(v), shape)));
}

}  // namespace dattn
