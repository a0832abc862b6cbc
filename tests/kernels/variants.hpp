// Score rules and normalisers of every kind, for tables of tests.
#pragma once

#include <utility>
#include <vector>

#include "tests/kernels/problem.hpp"
#include "tests/sanitized.hpp"

namespace dattn {

struct Variant {
  std::string name;
  bool cap = false, alibi = false, bias = false, weights = false, sigmoid = false;
};

inline const std::vector<Variant>& variants_of_scores() {
  static const std::vector<Variant> table{
      {.name = "plain"},
      {.name = "cap", .cap = true},
      {.name = "alibi", .alibi = true},
      {.name = "bias", .bias = true},
      {.name = "weights", .weights = true},
      {.name = "cap alibi bias weights", .cap = true, .alibi = true, .bias = true, .weights = true},
      {.name = "sigmoid", .sigmoid = true},
      {.name = "sigmoid cap alibi", .cap = true, .alibi = true, .sigmoid = true},
  };
  return table;
}

/// Gives `problem` the rules of `variant`, with numbers that matter.
template <class T>
void apply(const Variant& variant, Problem<T>& problem) {
  const auto heads = static_cast<std::size_t>(problem.shape.query_heads);
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  Score& score = problem.score;
  if (variant.cap) score.soft_cap = 1.5;
  if (variant.alibi) {
    for (std::size_t h = 0; h < heads; ++h) {
      score.alibi.push_back(std::exp2(-3.0f - static_cast<float>(h)));
    }
  }
  if (variant.bias) {
    score.reach = 9;
    for (std::size_t i = 0; i < heads * 19; ++i) score.bias.push_back(normal(random));
  }
  if (variant.weights) {
    for (Index i = 0; i < problem.shape.keys * problem.shape.key_heads; ++i) {
      problem.key_weights.push_back(normal(random));
    }
  }
  score.sigmoid = variant.sigmoid;
  if (variant.sigmoid) score.shift = -std::log(static_cast<double>(problem.shape.keys));
}

struct ShapeMask {
  Shape shape;
  std::string mask;
};

inline std::string name_of(const ShapeMask& c) {
  const Shape& s = c.shape;
  return std::to_string(s.queries) + "x" + std::to_string(s.keys) + " heads " +
         std::to_string(s.query_heads) + "/" + std::to_string(s.key_heads) + "/" +
         std::to_string(s.value_heads) + " d " + std::to_string(s.d_qk) + "/" +
         std::to_string(s.d_v) + " " + c.mask;
}

/// Lengths that nothing divides, few rows (decode), one long row of tiles, groups of heads, odd
/// dims.
inline const std::vector<ShapeMask>& shapes_and_masks() {
  static const std::vector<ShapeMask> table{
      {{1, 1, 1, 1, 1, 1, 1}, "causal"},
      {{1, 700, 8, 2, 2, 64, 48}, "causal"},
      {{1, 513, 6, 3, 2, 17, 33}, "window:300,0/sink:5"},
      {{3, 400, 4, 1, 1, 80, 20}, "causal"},
      {{16, 300, 2, 1, 2, 40, 40}, "causal"},
      {{9, 300, 6, 1, 1, 32, 64}, "documents:150,150"},
      {{63, 96, 2, 2, 1, 17, 3}, "causal"},
      {{130, 130, 6, 3, 2, 80, 80}, "causal"},
      {{130, 97, 2, 1, 2, 128, 128}, "causal"},  // the first rows see no key
      {{97, 257, 1, 1, 1, 256, 128}, "full"},
      {{300, 300, 4, 2, 2, 64, 64}, "window:40,9/sink:3"},
      {{191, 191, 3, 1, 3, 8, 5}, "documents:1,0,95,2,93"},
      {{130, 130, 4, 2, 4, 12, 9}, "causal@0;full@1;window:9,0/sink:2@2;documents:65,65@3"},
      {{70, 1200, 2, 1, 1, 32, 32}, "causal"},
      {{200, 300, 4, 2, 1, 24, 40}, "s2:block=4,local=2,stride=4,step=1"},
      {{100, 110, 4, 2, 1, 17, 33}, "dilated:9,2,3"},
      {{160, 160, 3, 3, 3, 17, 33}, "s2:block=8,local=1,stride=3,step=1,dense=1/sink:3"},
  };
  return table;
}

/// All of these under all variants; under a sanitizer each with every third.
inline std::vector<std::pair<ShapeMask, Variant>> shapes_and_variants() {
  std::vector<std::pair<ShapeMask, Variant>> pairs;
  std::size_t turn = 0;
  for (const ShapeMask& c : shapes_and_masks()) {
    for (const Variant& variant : variants_of_scores()) {
      if (turn++ % (kSanitized ? 3 : 1) == 0) pairs.emplace_back(c, variant);
    }
  }
  return pairs;
}

}  // namespace dattn
