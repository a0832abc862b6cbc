#pragma once

#include <span>
#include <string>

#include "kernels/shape.hpp"

namespace dattn {

/// What a Block is part of. O stands for Partials: (m, l, a) records, kernels/partial.hpp. Stats
/// are the two numbers a query row and head that the backward pass has of the forward pass: LSE,
/// and delta, the sum of dO * O.
enum class Kind { Q, K, V, O, dO, Stats, dQ, dK, dV };

inline constexpr Kind kKinds[] = {Kind::Q,     Kind::K,  Kind::V,  Kind::O, Kind::dO,
                                  Kind::Stats, Kind::dQ, Kind::dK, Kind::dV};

std::string_view name_of(Kind kind);

/// Whether its rows are queries; else they are keys.
bool of_queries(Kind kind);
/// Whether kernels add to it: Partials and gradients, which start over no pair.
bool is_sum(Kind kind);

/// Which half of training: forward makes O of Q, K, V; backward makes dQ, dK, dV of these, dO and
/// Stats.
enum class Pass { forward, backward };

std::string_view name_of(Pass pass);
/// Kinds of the inputs and of the results of a pass.
std::span<const Kind> input_kinds(Pass pass);
std::span<const Kind> result_kinds(Pass pass);

/// What a pass reads and sums up of queries, or of keys: if the pairs of some of them are computed
/// elsewhere, the inputs travel there, and the sums back.
struct Side {
  std::span<const Kind> inputs, sums;
};
Side query_side(Pass pass);
Side key_side(Pass pass);

/// A rectangle of a global tensor: some rows (places in shard order, see Partition) of some heads,
/// with all their numbers. In memory [rows, heads, numbers], rows in the order of `rows`, heads
/// ascending.
struct Block {
  Kind kind = Kind::Q;
  Ranges heads;  ///< ascending, neighbours joined
  Ranges rows;

  Block() = default;
  Block(Kind kind_in, Ranges heads_in, Ranges rows_in);
  Block(Kind kind_in, Range heads_in, Ranges rows_in);

  Index head_count() const { return size(heads); }
  Index row_count() const { return size(rows); }
  bool empty() const { return heads.empty() || rows.empty(); }
  friend bool operator==(const Block&, const Block&) = default;
};

/// What both hold; rows in the order of `a`. @pre a.kind == b.kind
Block intersect(const Block& a, const Block& b);
/// Whether `outer` holds all of `inner`.
bool contains(const Block& outer, const Block& inner);

/// Numbers of one (row, head) of this kind.
Index dim_of(Kind kind, const Shape& shape);
/// Heads of the whole tensor.
Index heads_of(Kind kind, const Shape& shape);
/// The query heads that the heads `heads` of a tensor of this kind serve: the same for queries.
Range query_heads_of(Kind kind, Range heads, const Shape& shape);
Ranges query_heads_of(Kind kind, const Ranges& heads, const Shape& shape);
/// The heads of a tensor of this kind that the query heads `heads` bear on.
Range heads_touched(Kind kind, Range heads, const Shape& shape);
Ranges heads_touched(Kind kind, const Ranges& heads, const Shape& shape);
/// Bytes of one (row, head) of this kind: of Q, K, V and dO numbers of the type, of all others
/// sum_bytes_of(type).
Index record_bytes(Kind kind, const Shape& shape, Type type);
/// Size in memory.
Index bytes_of(const Block& block, const Shape& shape, Type type);

/// E.g. "K[heads 0-3, rows 128-255]".
std::string text(const Block& block);

}  // namespace dattn
