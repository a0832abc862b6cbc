#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/shape.hpp"

namespace dattn {

/// How positions turn the d_rope numbers of queries and keys, stretched to long contexts by YaRN.
/// Source: RoPE (Su et al. 2021); YaRN (Peng et al. 2023) as the published DeepSeek models have it.
struct Rope {
  double base = 10000;
  Index copies = 1;       ///< pieces of d_rope that each have all frequencies (convert.hpp)
  double factor = 1;      ///< of the context length; 1: no YaRN, and what follows is not read
  Index original = 4096;  ///< tokens of the context before it was stretched
  double beta_fast = 32;  ///< turns in `original` tokens from which a frequency stays as it is
  double beta_slow = 1;   ///< turns up to which it is divided by `factor`
  double mscale = 1;
  double mscale_all_dim = 1;

  friend bool operator==(const Rope&, const Rope&) = default;
};

/// Sizes of multi-head latent attention (MLA).
/// Source: DeepSeek-V2 (2024), section 2.1; names as in the published config.json: hidden_size,
/// num_attention_heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim,
/// rms_norm_eps.
struct LatentSizes {
  Index model = 0;  ///< D: numbers of a token as it enters and leaves
  Index heads = 1;
  Index q_rank = 0;  ///< of the compressed queries; 0: queries are made from x itself
  Index kv_rank = 512;
  Index d_nope = 128;  ///< of a head's queries and keys, without position
  Index d_rope = 64;   ///< with position: of each head's queries, of one key for all heads
  Index d_v = 128;
  Rope rope = {};
  double epsilon = 1e-6;  ///< of RMSNorm

  /// Numbers that queries are made from.
  Index q_width() const { return q_rank > 0 ? q_rank : model; }
  /// Numbers of a head's query or key in the expanded form.
  Index d_qk() const { return d_nope + d_rope; }
  /// Numbers of a token in the cache: the latent, then the key with position.
  Index row() const { return kv_rank + d_rope; }
  /// What multiplies q.k in either form: 1 / sqrt(d_nope + d_rope), under YaRN times the square of
  /// 0.1 mscale_all_dim ln(factor) + 1.
  double scale() const;

  friend bool operator==(const LatentSizes&, const LatentSizes&) = default;
};

/// Why nobody can compute these sizes, in one line with the fix; nothing if they are sound.
std::optional<std::string> complaint(const LatentSizes& sizes);

/// The sizes of a published model and its name.
struct LatentModel {
  std::string_view name;
  LatentSizes sizes;
};

/// deepseek-v2-lite, deepseek-v3, kimi-k2.
std::span<const LatentModel> latent_models();

/// The sizes of the model of this name, or null.
const LatentSizes* find_latent_model(std::string_view name);

/// Radians that each of the d_rope / 2 pairs turns from one position to the next.
std::vector<double> rope_frequencies(const LatentSizes& sizes);

/// What cosine and sine are multiplied by: 1 without YaRN and in every model of the table.
double rope_magnitude(const Rope& rope);

/// The shape of attention in the absorbed form, for attend: one key head of `latent` + d_rope
/// numbers, whose first `latent` are the one value head. `latent` is kv_rank, or a slice's part.
Shape absorbed_shape(const LatentSizes& sizes, Index queries, Index keys, Index latent);
/// In the expanded form: each head has keys [d_nope + d_rope] and values [d_v] of its own.
Shape expanded_shape(const LatentSizes& sizes, Index queries, Index keys);

}  // namespace dattn
