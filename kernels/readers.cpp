#include "kernels/readers.hpp"

#include <algorithm>

#include "kernels/decode.hpp"

namespace dattn {
namespace {

constexpr Index kLeastKeys = 1024;  // of a range with few readers,
constexpr Index kLeastOfPart = 32;  // and of a part of it, in the mean: each is a call of decode

/// What rows see of `keys`, each row with neighbours that see some of the same.
std::vector<Part> parts_of(const LiveRows& live, Range keys, Index most_rows) {
  std::vector<Part> parts;
  for (Index row = 0; row < live.rows().end; ++row) {
    Range seen{keys.end, keys.begin};
    for (const Range span : live.of(row)) {
      const Range some = intersect(span, keys);
      if (some.empty()) continue;
      seen = {std::min(seen.begin, some.begin), std::max(seen.end, some.end)};
    }
    if (seen.empty()) continue;
    if (!parts.empty() && parts.back().rows.end == row && parts.back().rows.size() < most_rows &&
        !intersect(parts.back().keys, seen).empty()) {
      Part& last = parts.back();
      last = {{last.rows.begin, row + 1},
              {std::min(last.keys.begin, seen.begin), std::max(last.keys.end, seen.end)}};
    } else {
      parts.push_back({{row, row + 1}, seen});
    }
  }
  return parts;
}

}  // namespace

Where where_of(const Where& where, const Part& some) {
  Where found = where;
  found.queries = part(where.queries, some.rows);
  found.keys = part(where.keys, some.keys);
  if (where.key_weights.data != nullptr) found.key_weights = where.key_weights.part(some.keys);
  return found;
}

Readers readers_of(const Where& where, const Mask& mask, const std::vector<HeadGroup>& groups) {
  const Index rows = size(where.queries);
  const Index keys = size(where.keys);
  Index lanes = 0;  // of a row
  for (const HeadGroup& group : groups) {
    lanes = std::max(lanes, group.heads.size());
    const Index head = where.query_heads.begin + group.heads.begin;
    if (mask.variant(head) != mask.variant(where.query_heads.begin)) return {};
  }
  const Index most_rows = kDecodeLanes / lanes;
  if (keys < kLeastKeys || rows > kMostRowsByReaders || rows <= most_rows || most_rows == 0) {
    return {};
  }
  const LiveRows live(where, mask, where.query_heads.begin, {0, rows});
  // Where rows begin and cease to see keys, in order.
  std::vector<std::pair<Index, Index>> edges{{0, 0}, {keys, 0}};
  for (Index row = 0; row < rows; ++row) {
    for (const Range span : live.of(row)) {
      edges.emplace_back(span.begin, 1);
      edges.emplace_back(span.end, -1);
    }
  }
  std::sort(edges.begin(), edges.end());
  std::vector<Range> few;
  Index seeing = 0;
  for (std::size_t i = 0; i + 1 < edges.size(); ++i) {
    seeing += edges[i].second;
    if (seeing <= most_rows) append(few, 0, {edges[i].first, edges[i + 1].first});
  }
  Readers found;
  Index done = 0;
  for (const Range range : few) {
    if (range.size() < kLeastKeys) continue;
    const std::vector<Part> parts = parts_of(live, range, most_rows);
    Index taken = 0;
    for (const Part& one : parts) taken += one.keys.size();
    if (parts.empty() || taken < std::ssize(parts) * kLeastOfPart) continue;
    append(found.many, 0, {done, range.begin});
    found.few.push_back(parts);
    done = range.end;
  }
  append(found.many, 0, {done, keys});
  return found;
}

}  // namespace dattn
