#include "parallel/head_cost.hpp"

#include <algorithm>
#include <map>

#include "kernels/area.hpp"

namespace dattn {
namespace {

/// Rows of a register, in the widest kernels.
constexpr Index kTogether = 16;
/// Reading Q and writing O of a row takes as long as so many pairs: 50 to 85 forward, 80 to 120
/// backward, as seen with bench_sparse under masks of a few hundred keys a row.
constexpr Index kPairsOfRow = 64;
/// Groups of rows that stand for all of them.
constexpr Index kSample = 256;

/// What `of(head)` gives, asked once for heads that see the same.
template <class Of>
std::vector<Index> by_head(const Shape& shape, const Mask& mask, const Of& of) {
  std::map<Index, Index> known;  // by variant
  std::vector<Index> all;
  for (Index h = 0; h < shape.query_heads; ++h) {
    const auto [at, is_new] = known.try_emplace(mask.variant(h));
    if (is_new) at->second = of(h);
    all.push_back(at->second);
  }
  return all;
}

Index pairs_of(const Shape& shape, const Mask& mask, Index head, const Run& queries) {
  return area(mask, head, {queries}, {{0, shape.keys, 1}});
}

/// Pairs that are computed and not allowed.
Index cut_pairs(const Shape& shape, const Mask& mask, Index head) {
  // Kernels take rows residue by residue.
  const Index step = std::max<Index>(1, mask.step(head));
  const Index stretch = kTogether * step;
  const Index groups = (shape.queries + stretch - 1) / stretch * step;
  const Index samples = std::min(groups, kSample);
  Index cut = 0;
  Index rows = 0;
  for (Index i = 0; i < samples; ++i) {
    const Index group = i * groups / samples;
    const Index first = group / step * stretch + group % step;
    const Index count = std::min(kTogether, (shape.queries - first + step - 1) / step);
    if (count < 1) continue;
    const Run queries{shape.first_query() + first, count, step};
    cut += count * size(keys_seen(mask, head, {queries}, shape.keys)) -
           pairs_of(shape, mask, head, queries);
    rows += count;
  }
  return cut * shape.queries / std::max<Index>(1, rows);
}

}  // namespace

std::vector<Index> pairs_by_head(const Shape& shape, const Mask& mask) {
  return by_head(shape, mask, [&](Index head) {
    return pairs_of(shape, mask, head, {shape.first_query(), shape.queries, 1});
  });
}

std::vector<Index> cost_by_head(const Shape& shape, const Mask& mask) {
  return by_head(shape, mask, [&](Index head) {
    return pairs_of(shape, mask, head, {shape.first_query(), shape.queries, 1}) +
           cut_pairs(shape, mask, head) + kPairsOfRow * shape.queries;
  });
}

}  // namespace dattn
