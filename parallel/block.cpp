#include "parallel/block.hpp"

#include <array>

#include "kernels/check.hpp"
#include "kernels/partial.hpp"

namespace dattn {

std::string_view name_of(Kind kind) {
  switch (kind) {
    case Kind::Q:
      return "Q";
    case Kind::K:
      return "K";
    case Kind::V:
      return "V";
    case Kind::O:
      return "O";
    case Kind::dO:
      return "dO";
    case Kind::Stats:
      return "Stats";
    case Kind::dQ:
      return "dQ";
    case Kind::dK:
      return "dK";
    case Kind::dV:
      return "dV";
  }
  return "?";
}

bool of_queries(Kind kind) {
  return kind != Kind::K && kind != Kind::V && kind != Kind::dK && kind != Kind::dV;
}

bool is_sum(Kind kind) {
  return kind == Kind::O || kind == Kind::dQ || kind == Kind::dK || kind == Kind::dV;
}

std::string_view name_of(Pass pass) { return pass == Pass::forward ? "forward" : "backward"; }

std::span<const Kind> input_kinds(Pass pass) {
  static constexpr std::array kAll{Kind::Q, Kind::K, Kind::V, Kind::dO, Kind::Stats};
  return std::span(kAll).first(pass == Pass::forward ? 3 : kAll.size());
}

std::span<const Kind> result_kinds(Pass pass) {
  static constexpr std::array kAll{Kind::O, Kind::dQ, Kind::dK, Kind::dV};
  return pass == Pass::forward ? std::span(kAll).first(1) : std::span(kAll).subspan(1);
}

Side query_side(Pass pass) {
  static constexpr std::array kInputs{Kind::Q, Kind::dO, Kind::Stats};
  static constexpr std::array kSums{Kind::O, Kind::dQ};
  if (pass == Pass::forward) return {std::span(kInputs).first(1), std::span(kSums).first(1)};
  return {kInputs, std::span(kSums).last(1)};
}

Side key_side(Pass pass) {
  static constexpr std::array kInputs{Kind::K, Kind::V};
  static constexpr std::array kSums{Kind::dK, Kind::dV};
  if (pass == Pass::forward) return {kInputs, {}};
  return {kInputs, kSums};
}

Block::Block(Kind kind_in, Ranges heads_in, Ranges rows_in)
    : kind(kind_in), heads(std::move(heads_in)), rows(std::move(rows_in)) {}

Block::Block(Kind kind_in, Range heads_in, Ranges rows_in)
    : kind(kind_in), rows(std::move(rows_in)) {
  append(heads, heads_in);
}

Block intersect(const Block& a, const Block& b) {
  CHECK(a.kind == b.kind, name_of(a.kind), name_of(b.kind));
  return {a.kind, intersect(a.heads, b.heads), intersect(a.rows, b.rows)};
}

bool contains(const Block& outer, const Block& inner) {
  return outer.kind == inner.kind &&
         size(intersect(inner.heads, outer.heads)) == size(inner.heads) &&
         size(intersect(inner.rows, outer.rows)) == size(inner.rows);
}

Index dim_of(Kind kind, const Shape& shape) {
  switch (kind) {
    case Kind::Q:
    case Kind::K:
    case Kind::dQ:
    case Kind::dK:
      return shape.d_qk;
    case Kind::V:
    case Kind::dO:
    case Kind::dV:
      return shape.d_v;
    case Kind::O:
      return record_length(shape.d_v);
    case Kind::Stats:
      return 2;
  }
  return 0;
}

Index heads_of(Kind kind, const Shape& shape) {
  switch (kind) {
    case Kind::Q:
    case Kind::O:
    case Kind::dO:
    case Kind::Stats:
    case Kind::dQ:
      return shape.query_heads;
    case Kind::K:
    case Kind::dK:
      return shape.key_heads;
    case Kind::V:
    case Kind::dV:
      return shape.value_heads;
  }
  return 0;
}

Range query_heads_of(Kind kind, Range heads, const Shape& shape) {
  const Index served = shape.query_heads / heads_of(kind, shape);
  return {heads.begin * served, heads.end * served};
}

Ranges query_heads_of(Kind kind, const Ranges& heads, const Shape& shape) {
  Ranges all;
  for (const Range r : heads) append(all, query_heads_of(kind, r, shape));
  return all;
}

Range heads_touched(Kind kind, Range heads, const Shape& shape) {
  if (of_queries(kind)) return heads;
  const bool of_keys = kind == Kind::K || kind == Kind::dK;
  return of_keys ? shape.key_heads_of(heads) : shape.value_heads_of(heads);
}

Ranges heads_touched(Kind kind, const Ranges& heads, const Shape& shape) {
  std::vector<Range> all;
  for (const Range r : heads) all.push_back(heads_touched(kind, r, shape));
  return union_of(std::move(all));
}

Index record_bytes(Kind kind, const Shape& shape, Type type) {
  const bool input = kind == Kind::Q || kind == Kind::K || kind == Kind::V || kind == Kind::dO;
  return dim_of(kind, shape) * (input ? bytes_of(type) : sum_bytes_of(type));
}

Index bytes_of(const Block& block, const Shape& shape, Type type) {
  return block.row_count() * block.head_count() * record_bytes(block.kind, shape, type);
}

std::string text(const Block& block) {
  const auto range = [](Range r) {
    return std::to_string(r.begin) + (r.size() == 1 ? "" : "-" + std::to_string(r.end - 1));
  };
  const auto ranges = [&](const Ranges& all) {
    constexpr std::size_t kShown = 3;
    std::string shown;
    for (std::size_t i = 0; i < std::min(all.size(), kShown); ++i) {
      shown += (i == 0 ? "" : ",") + range(all[i]);
    }
    if (all.empty()) shown = "none";
    if (all.size() > kShown) shown += ",+" + std::to_string(all.size() - kShown) + " more";
    return shown;
  };
  return std::string(name_of(block.kind)) + "[heads " + ranges(block.heads) + ", rows " +
         ranges(block.rows) + "]";
}

}  // namespace dattn
