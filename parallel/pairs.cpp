#include "parallel/pairs.hpp"

#include <algorithm>

namespace dattn {

Index PairCounter::count(Range heads, const Ranges& query_rows, const Ranges& key_rows) {
  const Mask& mask = problem_.mask();
  const Runs keys = problem_.keys().positions(key_rows);
  Index sum = 0;
  if (dense(keys)) {
    const Runs queries = problem_.queries().positions(query_rows);
    for (const auto& [head, times] : variants(mask, heads)) {
      sum += times * area(mask, head, queries, keys);
    }
    return sum;
  }
  const Index step = std::max_element(keys.begin(), keys.end(), [](const Run& a, const Run& b) {
                       return a.step < b.step;
                     })->step;
  for (const auto& [head, times] : variants(mask, heads)) {
    auto found = rows_.find({head, query_rows});
    if (found == rows_.end()) {
      found = rows_
                  .emplace(std::tuple(head, query_rows),
                           RowSpans(mask, head, problem_.queries().positions(query_rows),
                                    {0, problem_.shape().keys}, step))
                  .first;
    }
    sum += times * found->second.area(keys);
  }
  return sum;
}

Index PairCounter::count(const Program& program, const Attend& attend) {
  const auto block = [&](SlotId s) -> const Block& {
    return program.slots[static_cast<std::size_t>(s)].block;
  };
  return count(heads_served(program, attend, problem_.shape()), block(attend.q).rows,
               block(attend.k).rows);
}

Range heads_served(const Program& program, const Attend& attend, const Shape& shape) {
  const auto heads = [&](SlotId s) {
    return program.slots[static_cast<std::size_t>(s)].block.heads;
  };
  const Index by_key = shape.query_heads / shape.key_heads;
  const Index by_value = shape.query_heads / shape.value_heads;
  const Range k = heads(attend.k);
  const Range v = heads(attend.v);
  return intersect(heads(attend.q), intersect({k.begin * by_key, k.end * by_key},
                                              {v.begin * by_value, v.end * by_value}));
}

}  // namespace dattn
