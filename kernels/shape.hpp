#pragma once

#include <compare>
#include <optional>
#include <string>

#include "kernels/range.hpp"

namespace dattn {

/// Element type of Q, K, V and dO. O, LSE, Partials, gradients and statistics are double for f8 and
/// float for the others.
enum class Type { bf16, f4, f8 };

inline Index bytes_of(Type type) { return type == Type::bf16 ? 2 : type == Type::f4 ? 4 : 8; }
/// Of a number of O, LSE and the rest.
inline Index sum_bytes_of(Type type) { return type == Type::f8 ? 8 : 4; }
/// As options and reports have it.
inline const char* name_of(Type type) {
  return type == Type::bf16 ? "bf16" : type == Type::f4 ? "f4" : "f8";
}

/// Extents of the whole attention problem.
///
/// Q is [queries, query_heads, d_qk], K [keys, key_heads, d_qk], V [keys, value_heads, d_v] and
/// O [queries, query_heads, d_v]. Query head h reads key head h * key_heads / query_heads and value
/// head h * value_heads / query_heads (GQA, MQA; keys and values may differ in their head counts).
/// Query row i stands at position i + keys - queries: the last query faces the last key, as in
/// decoding; with as many queries as keys a row's position is its number.
struct Shape {
  Index queries = 0;
  Index keys = 0;
  Index query_heads = 1;
  Index key_heads = 1;
  Index value_heads = 1;
  Index d_qk = 1;
  Index d_v = 1;

  /// Position of query row 0.
  Index first_query() const { return keys - queries; }
  Index key_head(Index query_head) const { return query_head / (query_heads / key_heads); }
  Index value_head(Index query_head) const { return query_head / (query_heads / value_heads); }
  /// The key (or value) heads that the query heads `heads` read.
  Range key_heads_of(Range heads) const;
  Range value_heads_of(Range heads) const;
  /// Floating-point operations of one allowed (head, query, key) pair: two dot products.
  double flops_per_pair() const { return 2.0 * static_cast<double>(d_qk + d_v); }
  /// The same backward, where scores are computed again: three products of d_qk, two of d_v.
  double backward_flops_per_pair() const {
    return 6.0 * static_cast<double>(d_qk) + 4.0 * static_cast<double>(d_v);
  }

  friend auto operator<=>(const Shape&, const Shape&) = default;
};

/// Why nobody can compute this shape, in one line with the fix; nothing if it is sound.
std::optional<std::string> complaint(const Shape& shape);

}  // namespace dattn
