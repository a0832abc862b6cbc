#include "kernels/key_order.hpp"

#include <algorithm>

namespace dattn {
namespace {

constexpr std::size_t kManySpans = 4;  // a row of fewer is left alone
constexpr Index kRows = 6;             // rows that are looked at

/// How many spans a row of these spans sees in the new order.
Index spans_in(const std::vector<Range>& order, std::span<const Range> spans) {
  Index count = 0;
  Index before = 0;  // keys of the ranges done
  Index end = -1;    // of the last span, in the new order
  for (const Range range : order) {
    auto span = std::upper_bound(spans.begin(), spans.end(), range.begin,
                                 [](Index at, const Range& x) { return at < x.end; });
    for (; span != spans.end() && span->begin < range.end; ++span) {
      const Range part = intersect(*span, range);
      const Index begin = before + part.begin - range.begin;
      if (begin != end) ++count;
      end = begin + part.size();
    }
    before += range.size();
  }
  return count;
}

}  // namespace

std::vector<Range> key_order(const Where& where, const Mask& mask, Index head) {
  const Index rows = size(where.queries);
  const Index keys = size(where.keys);
  if (rows == 0) return {};
  const LiveRows last(where, mask, head, {rows - 1, rows});
  const std::span<const Range> seen = last.of(rows - 1);
  if (seen.size() <= kManySpans) return {};
  std::vector<Range> order(seen.begin(), seen.end());
  Index at = 0;
  for (const Range span : seen) {
    if (span.begin > at) order.push_back({at, span.begin});
    at = span.end;
  }
  if (at < keys) order.push_back({at, keys});
  Index lying = 0;
  Index ordered = 0;
  for (Index i = 0; i < kRows; ++i) {
    const Index row = even_part(rows, kRows, i).begin;
    const LiveRows live(where, mask, head, {row, row + 1});
    lying += std::ssize(live.of(row));
    ordered += spans_in(order, live.of(row));
  }
  return 2 * ordered <= lying ? order : std::vector<Range>{};
}

std::map<Index, std::vector<Range>> key_orders(const Where& where, const Mask& mask,
                                               const std::vector<HeadGroup>& groups) {
  std::map<Index, std::vector<Range>> orders;
  bool any = false;
  for (const HeadGroup& group : groups) {
    const Index head = where.query_heads.begin + group.heads.begin;
    const auto [known, is_new] = orders.try_emplace(mask.variant(head));
    if (is_new) known->second = key_order(where, mask, head);
    any = any || !known->second.empty();
  }
  if (!any) orders.clear();
  return orders;
}

Where only_heads(const Where& where, Range heads, Range key_heads, Range value_heads) {
  Where part = where;
  const auto only = [](Range all, Range local) {
    return Range{all.begin + local.begin, all.begin + local.end};
  };
  part.query_heads = only(where.query_heads, heads);
  part.key_heads = only(where.key_heads, key_heads);
  part.value_heads = only(where.value_heads, value_heads);
  if (where.key_weights.data != nullptr) part.key_weights = where.key_weights.only(key_heads);
  return part;
}

Where group_in_order(const Where& where, const HeadGroup& group, const std::vector<Range>& order) {
  Where part = only_heads(where, group.heads, {group.key_head, group.key_head + 1},
                          {group.value_head, group.value_head + 1});
  if (order.empty()) return part;
  part.keys.clear();
  for (const Range range : order) {
    const Runs runs = dattn::part(where.keys, range);
    part.keys.insert(part.keys.end(), runs.begin(), runs.end());
  }
  return part;
}

}  // namespace dattn
