#include "kernels/shape.hpp"

#include <array>
#include <limits>
#include <utility>

namespace dattn {
namespace {

Range heads_read(Range heads, Index group) {
  if (heads.empty()) return {0, 0};
  return {heads.begin / group, (heads.end - 1) / group + 1};
}

bool fits(std::initializer_list<Index> factors) {
  // Element counts stay below 2^60, so that byte counts and sums over ranks fit in an Index.
  Index product = 1;
  for (const Index f : factors) {
    if (f != 0 && product > (Index{1} << 60) / f) return false;
    product *= f;
  }
  return true;
}

}  // namespace

Range Shape::key_heads_of(Range heads) const { return heads_read(heads, query_heads / key_heads); }

Range Shape::value_heads_of(Range heads) const {
  return heads_read(heads, query_heads / value_heads);
}

std::optional<std::string> complaint(const Shape& s) {
  const std::array<std::pair<const char*, Index>, 7> extents{{{"queries", s.queries},
                                                              {"keys", s.keys},
                                                              {"query heads", s.query_heads},
                                                              {"key heads", s.key_heads},
                                                              {"value heads", s.value_heads},
                                                              {"head dim of Q and K", s.d_qk},
                                                              {"head dim of V", s.d_v}}};
  for (const auto& [name, extent] : extents) {
    if (extent < 1) return std::string(name) + " must be at least 1, not " + std::to_string(extent);
  }
  constexpr Index kMostHeads = 65536;  // far beyond any model; plans list heads one by one
  if (s.query_heads > kMostHeads) {
    return std::to_string(s.query_heads) + " query heads; at most " + std::to_string(kMostHeads) +
           " are taken";
  }
  for (const auto& [name, heads] :
       {std::pair{"key", s.key_heads}, std::pair{"value", s.value_heads}}) {
    if (s.query_heads % heads != 0) {
      return std::to_string(s.query_heads) + " query heads are no multiple of " +
             std::to_string(heads) + " " + name + " heads; each " + name +
             " head must serve the same number of query heads";
    }
  }
  if (!fits({s.queries, s.query_heads, s.d_qk}) || !fits({s.queries, s.query_heads, s.d_v + 2}) ||
      !fits({s.keys, s.key_heads, s.d_qk}) || !fits({s.keys, s.value_heads, s.d_v}) ||
      !fits({s.queries, s.keys, s.query_heads})) {
    return std::string("a tensor, or the number of (head, query, key) pairs, passes 2^60");
  }
  return std::nullopt;
}

}  // namespace dattn
