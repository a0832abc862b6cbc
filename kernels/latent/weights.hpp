#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "kernels/bfloat.hpp"
#include "kernels/latent/sizes.hpp"

namespace dattn {

/// Which part of the weights somebody holds. Heads slice what makes and reads heads; the latent
/// slices the absorbed form. W_DKV may be held with more columns than the latent (all of them, so
/// that the RMS of a latent is known without a message: it is small) or with just the same.
struct LatentPart {
  Range heads;    ///< of up_q, up_k, up_v and out
  Range latent;   ///< dims of the latent: rows of up_k and up_v, and what is cached
  Range columns;  ///< of down_kv and kv_gamma; holds `latent`
  friend bool operator==(const LatentPart&, const LatentPart&) = default;
};

/// All heads and the whole latent.
LatentPart whole(const LatentSizes& sizes);

/// The weights of one layer, or a part of them; E float or BFloat16 (gammas are float), row-major,
/// written so that rows of x multiply them from the left. Extents in the shapes are those of the
/// part.
///
///   c, k_r = x down_kv        cache row = (RMSNorm(c) kv_gamma, RoPE(k_r))
///   c_q = RMSNorm(x down_q) q_gamma   (x itself where q_rank is 0)
///   q_h, q_r,h = c_q up_q     k_h = row up_k,h    v_h = row up_v,h    (row: its latent)
///   y = sum over h of O_h out_h
///
/// Source: DeepSeek-V2 (2024), equations 9-19. Transposed, these are q_a_proj, q_b_proj (q_proj
/// without compression), kv_a_proj_with_mqa, the two halves of each head of kv_b_proj, and o_proj
/// of the published checkpoints.
template <class E>
struct LatentWeightsOf {
  LatentSizes sizes;  ///< of the whole layer
  LatentPart part;
  std::vector<E> down_q = {};        ///< W_DQ [model, q_rank]; empty where q_rank is 0
  std::vector<float> q_gamma = {};   ///< [q_rank]
  std::vector<E> up_q = {};          ///< W_UQ,h beside W_QR,h [q_width, heads, d_nope + d_rope]
  std::vector<E> down_kv = {};       ///< W_DKV beside W_KR [model, columns + d_rope]
  std::vector<float> kv_gamma = {};  ///< [columns]
  std::vector<E> up_k = {};          ///< W_UK,h [heads, latent, d_nope]
  std::vector<E> up_v = {};          ///< W_UV,h [heads, latent, d_v]
  std::vector<E> out = {};           ///< W_O,h [heads, d_v, model]
};
/// As they are made, turned, cut and judged.
using LatentWeights = LatentWeightsOf<float>;
/// As a layer keeps them: a step of few tokens takes as long as reading them.
using StoredWeights = std::variant<LatentWeights, LatentWeightsOf<BFloat16>>;

/// Random weights: N(0, 1 / inputs), gammas 1 + N(0, 0.01). An element depends on the seed, the
/// matrix and its place in the whole matrix alone, not on the part or the threads.
/// @pre the sizes are sound (complaint), the part lies in them, part.columns holds part.latent
LatentWeights random_weights(const LatentSizes& sizes, const LatentPart& part, std::int64_t seed,
                             int threads = 1);

/// A part of weights that hold it.
/// @pre weights.part holds `part`
LatentWeights slice(const LatentWeights& weights, const LatentPart& part);

/// Every matrix rounded to bfloat16, but for gammas; matrix by matrix, so that the last one is all
/// that is there twice.
LatentWeightsOf<BFloat16> narrowed(LatentWeights weights);
/// The numbers that narrowed() has, in float: what a judge must read.
void round_to_bfloat16(LatentWeights& weights);

/// Aborts unless every matrix has the extents that sizes and part say: a bug of who filled them.
/// (Operators ask for those that they read alone, so that a layer may let go of the others.)
template <class E>
void check_weights(const LatentWeightsOf<E>& weights);

}  // namespace dattn
