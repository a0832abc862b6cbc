#include "parallel/cache.hpp"

#include <map>
#include <numeric>

#include "kernels/area.hpp"

namespace dattn {

Index CacheNeed::bytes(const Problem& problem, int rank) const {
  const auto sum = [&](const std::vector<std::vector<Index>>& tokens) {
    const std::vector<Index>& of = tokens[static_cast<std::size_t>(rank)];
    return std::accumulate(of.begin(), of.end(), Index{0});
  };
  const Shape& shape = problem.shape();
  return (sum(keys) * shape.d_qk + sum(values) * shape.d_v) * bytes_of(problem.type()) +
         (sum(pseudo_keys) * (shape.d_qk + 1) + sum(pseudo_values) * shape.d_v) *
             sum_bytes_of(problem.type());
}

namespace {

void add_pseudo_keys(const Problem& problem, Index later, CacheNeed& need) {
  const Shape& shape = problem.shape();
  const auto ranks = static_cast<std::size_t>(problem.ranks());
  const auto none = [&](Index heads) {
    return std::vector(ranks, std::vector<Index>(static_cast<std::size_t>(heads), 0));
  };
  need.pseudo_keys = none(shape.key_heads);
  need.pseudo_values = none(shape.value_heads);
  if (problem.compensate() == Compensate::off) return;
  for (const Dropped& entry : dropped_keys(problem.mask(), shape, {shape.keys, later, 1})) {
    for (std::size_t r = 0; r < ranks; ++r) {
      if (problem.keys().rows_at(static_cast<int>(r), entry.keys).empty()) continue;
      need.pseudo_keys[r][static_cast<std::size_t>(entry.key_head)] = 1;
      ++need.pseudo_values[r][static_cast<std::size_t>(entry.value_head)];
      if (problem.compensate() == Compensate::head) break;
    }
  }
}

}  // namespace

Ranges keys_kept(const Mask& mask, Range heads, const Run& later, Index keys) {
  std::vector<Range> all;
  for (const auto& [head, count] : variants(mask, heads)) {
    const Ranges seen = keys_seen(mask, head, {later}, keys);
    all.insert(all.end(), seen.begin(), seen.end());
  }
  return union_of(std::move(all));
}

CacheNeed cache_need(const Problem& problem, Index later) {
  const Shape& shape = problem.shape();
  std::map<Index, Ranges> known;  // by variant
  const auto seen = [&](Index head) -> const Ranges& {
    const auto [at, is_new] = known.try_emplace(problem.mask().variant(head));
    if (is_new) {
      at->second = keys_kept(problem.mask(), {head, head + 1}, {shape.keys, later, 1}, shape.keys);
    }
    return at->second;
  };
  // Tokens by rank and head, of `heads` that several query heads each read.
  const auto tokens = [&](Index heads) {
    std::vector<std::vector<Index>> all(static_cast<std::size_t>(problem.ranks()));
    const Index group = shape.query_heads / heads;
    for (Index h = 0; h < heads; ++h) {
      std::vector<Range> parts;
      for (Index q = h * group; q < (h + 1) * group; ++q) {
        const Ranges& one = seen(q);
        parts.insert(parts.end(), one.begin(), one.end());
      }
      const Ranges kept = union_of(std::move(parts));
      for (int r = 0; r < problem.ranks(); ++r) {
        all[static_cast<std::size_t>(r)].push_back(size(problem.keys().rows_at(r, kept)));
      }
    }
    return all;
  };
  CacheNeed need{tokens(shape.key_heads), tokens(shape.value_heads), {}, {}};
  add_pseudo_keys(problem, later, need);
  return need;
}

}  // namespace dattn
