#include "bench/sparse.hpp"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/area.hpp"

namespace dattn {
namespace {

using nlohmann::json;

/// Whether some query sees a key behind it.
bool looks_ahead(const Shape& shape, const Mask& mask) {
  std::vector<Range> spans;
  for (const auto& [head, count] : variants(mask, {0, shape.query_heads})) {
    for (Index q = shape.first_query(); q + 1 < shape.keys; ++q) {
      spans.clear();
      mask.spans(head, q, {q + 1, shape.keys}, spans);
      if (!spans.empty()) return true;
    }
  }
  return false;
}

template <class T>
json or_null(const std::optional<T>& x) {
  return x ? json(*x) : json();
}

double ratio(Index part, Index whole) {
  return static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

std::string dense_mask(const Shape& shape, const std::string& words) {
  return looks_ahead(shape, *parse_mask(words, shape)) ? "full" : "causal";
}

double area_of(const Shape& shape, const Mask& mask, Range queries) {
  double sum = 0;
  for (const auto& [head, count] : variants(mask, {0, shape.query_heads})) {
    const Index pairs =
        area(mask, head, {{queries.begin, queries.size(), 1}}, {{0, shape.keys, 1}});
    sum += static_cast<double>(pairs) * static_cast<double>(count);
  }
  return sum;
}

double area_of(const Shape& shape, const std::string& words) {
  return area_of(shape, *parse_mask(words, shape), {shape.first_query(), shape.keys});
}

json to_json(const SparseRow& row) {
  const Cell& c = row.cell;
  json j{{"mask", c.mask},       {"dense", row.dense},     {"kernel", c.kernel},
         {"dtype", c.dtype},     {"isa", c.isa->name},     {"tokens", c.tokens},
         {"heads", c.heads},     {"kv_heads", c.kv_heads}, {"d", c.d},
         {"threads", c.threads}, {"ranks", row.ranks}};
  if (!row.strategy.empty()) j["strategy"] = row.strategy;
  if (!row.refused.empty()) {
    j["refused"] = row.refused;
    return j;
  }
  j.update({{"density", row.density},
            {"seconds", row.seconds},
            {"dense_seconds", row.dense_seconds},
            {"dense_rows", row.dense_rows},
            {"speedup", row.speedup},
            {"of_ideal", row.of_ideal()},
            {"repeats", row.repeats},
            {"bytes", or_null(row.bytes)},
            {"dense_bytes", or_null(row.dense_bytes)}});
  if (row.strategy.empty()) return j;
  j.update({{"partition", row.partition},
            {"cached", or_null(row.cached)},
            {"dense_cached", or_null(row.dense_cached)},
            {"area_balance", or_null(row.area_balance)},
            {"kernel_balance", or_null(row.kernel_balance)}});
  return j;
}

std::string to_text(const SparseRow& row) {
  const Cell& c = row.cell;
  std::string text = fmt::format("{} {} {} tokens {}: ", c.kernel, c.dtype, c.mask, c.tokens);
  if (!row.partition.empty()) text = row.partition + " " + text;
  if (!row.strategy.empty()) text = row.strategy + " " + text;
  if (!row.refused.empty()) return text + "refused: " + row.refused;
  text += fmt::format(
      "density {:.4f}, {:.5f} s for {:.5f} s ({}, {} rows), {:.2f} times as fast, {:.3f} of ideal, "
      "{} repeats",
      row.density, row.seconds, row.dense_seconds, row.dense, row.dense_rows, row.speedup,
      row.of_ideal(), row.repeats);
  if (row.bytes) {
    text += fmt::format("; {} ranks send {} bytes for {}", row.ranks, *row.bytes, *row.dense_bytes);
    if (*row.dense_bytes > 0) text += fmt::format(", {:.4f}", ratio(*row.bytes, *row.dense_bytes));
  }
  if (row.cached) {
    text += fmt::format("; they keep {} bytes for {}, {:.4f}", *row.cached, *row.dense_cached,
                        ratio(*row.cached, *row.dense_cached));
  }
  if (row.area_balance) {
    text += fmt::format("; most over mean of the ranks: area {:.4f}, kernels {:.4f}",
                        *row.area_balance, *row.kernel_balance);
  }
  return text;
}

}  // namespace dattn
