#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/range.hpp"
#include "kernels/view.hpp"

namespace dattn {

/// Which numbers of a head RoPE turns together.
enum class RopePairs {
  halves,      ///< x[i] and x[i + d / 2], as published Llama, Qwen and Mistral checkpoints have it
  neighbours,  ///< x[2i] and x[2i + 1]
};

/// Sizes of grouped-query attention (GQA) with RoPE; Hkv = Hq is MHA, Hkv = 1 is MQA. Query head h
/// reads key head h / (Hq / Hkv).
struct GqaSizes {
  Index model = 0;     ///< D: numbers of a token as it enters and leaves
  Index heads = 1;     ///< Hq
  Index kv_heads = 1;  ///< Hkv
  Index dim = 2;       ///< d: of a head's queries, keys and values
  double rope_base = 10000;
  RopePairs pairs = RopePairs::halves;

  friend bool operator==(const GqaSizes&, const GqaSizes&) = default;
};

/// Why nobody can compute these sizes, in one line with the fix; nothing if they are sound.
std::optional<std::string> complaint(const GqaSizes& sizes);

/// The weights of one GQA layer without biases, row-major, written so that rows of x multiply them
/// from the left.
struct GqaWeights {
  GqaSizes sizes;
  std::vector<float> q;    ///< W_Q [model, heads, dim]
  std::vector<float> k;    ///< W_K [model, kv_heads, dim]
  std::vector<float> v;    ///< W_V [model, kv_heads, dim]
  std::vector<float> out;  ///< W_O [heads, dim, model]
};

/// Aborts unless every matrix has the extents that the sizes say.
void check_weights(const GqaWeights& weights);

/// Random weights: N(0, 1 / inputs), the same for the same seed.
/// @pre the sizes are sound
GqaWeights random_weights(const GqaSizes& sizes, std::int64_t seed);

/// The same layer with neighbours as pairs: columns of W_Q and W_K in another order, no number
/// changed.
GqaWeights with_neighbours(GqaWeights weights);

/// The judge: one layer in double by its definitions, scores times 1 / sqrt(dim). x [tokens, 1,
/// model] holds a sequence from its first token on; y [queries, model] is of the last `queries`
/// tokens, each attending to itself and to all before it.
/// @pre queries <= tokens
std::vector<double> gqa_reference(const GqaWeights& weights, View<const float> x, Index queries);

}  // namespace dattn
