#include "kernels/dropped.hpp"

#include <algorithm>
#include <map>

#include "kernels/area.hpp"

namespace dattn {
namespace {

/// What `seen`, ascending, leaves of `whole`.
Ranges without(Range whole, const Ranges& seen) {
  Ranges left;
  for (const Range r : seen) {
    append(left, {whole.begin, std::min(r.begin, whole.end)});
    whole.begin = std::max(whole.begin, r.end);
  }
  append(left, whole);
  return left;
}

}  // namespace

std::vector<Dropped> dropped_keys(const Mask& mask, const Shape& shape, const Run& queries) {
  const Range before{0, std::clamp<Index>(queries.first, 0, shape.keys)};
  if (before.empty()) return {};
  std::map<Index, Ranges> known;  // by variant
  const auto seen = [&](Index head) -> const Ranges& {
    const auto [at, is_new] = known.try_emplace(mask.variant(head));
    if (is_new) at->second = keys_seen(mask, head, {queries}, before.end);
    return at->second;
  };
  std::vector<Dropped> all;
  const Index group = shape.query_heads / shape.key_heads;
  for (Index k = 0; k < shape.key_heads; ++k) {
    const Range heads{k * group, (k + 1) * group};
    std::vector<Range> parts;
    for (const auto& [head, count] : variants(mask, heads)) {
      const Ranges& one = seen(head);
      parts.insert(parts.end(), one.begin(), one.end());
    }
    const Ranges keys = without(before, union_of(std::move(parts)));
    if (keys.empty()) continue;
    for (Range left = heads; !left.empty();) {
      const Index v = shape.value_head(left.begin);
      Range same{left.begin, left.begin};
      while (same.end < left.end && shape.value_head(same.end) == v) ++same.end;
      all.push_back({same, k, v, keys});
      left.begin = same.end;
    }
  }
  return all;
}

}  // namespace dattn
