#include "parallel/served.hpp"

#include "parallel/homes.hpp"
#include "parallel/pairs.hpp"

namespace dattn {
namespace {

/// Has the keys that are served their log-weights, of `all`.
void weigh(Served& served, std::span<const float> all) {
  Where& where = served.where;
  const Range heads = where.key_heads;
  served.key_weights.reserve(static_cast<std::size_t>(size(where.keys) * heads.size()));
  for (const Run& run : where.keys) {
    for (Index i = 0; i < run.count; ++i) {
      const float* of_key = all.data() + run.at(i) * where.shape.key_heads;
      served.key_weights.insert(served.key_weights.end(), of_key + heads.begin, of_key + heads.end);
    }
  }
  where.key_weights = {served.key_weights.data(), size(where.keys), heads.size(), 1};
}

}  // namespace

std::vector<Served> served(const Program& program, const Problem& problem, SlotId q, SlotId k,
                           SlotId v, std::span<const float> key_weights) {
  const auto block = [&](SlotId s) -> const Block& {
    return program.slots[static_cast<std::size_t>(s)].block;
  };
  const Shape& shape = problem.shape();
  std::vector<Served> all;
  for (const Range heads : heads_served(program, q, k, v, shape)) {
    Served& one = all.emplace_back();
    one.where.shape = shape;
    one.where.query_heads = heads;
    one.where.key_heads = shape.key_heads_of(heads);
    one.where.value_heads = shape.value_heads_of(heads);
    one.where.queries = problem.queries().positions(block(q).rows);
    one.where.keys = problem.keys().positions(block(k).rows);
    one.q = place_among(block(q).heads, heads);
    one.k = place_among(block(k).heads, one.where.key_heads);
    one.v = place_among(block(v).heads, one.where.value_heads);
    if (!key_weights.empty()) weigh(one, key_weights);
  }
  return all;
}

}  // namespace dattn
