#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels/latent/gqa.hpp"
#include "kernels/latent/weights.hpp"

namespace dattn {

// GQA weights to MLA weights, step by step. Source: TransMLA (arXiv 2502.07864, 2025).
//
//   0 merge     the keys of all heads are one key of Hkv d numbers, of which a head reads its own
//   1 RoRoPE    a pair of each key head turns at the same frequency; an orthogonal Hkv x Hkv matrix
//               for each frequency, applied to both members of the pairs, commutes with the turning
//   2 FreqFold  `fold` neighbouring frequencies are taken as one, so that matrices grow to
//               Hkv fold and concentrate more
//   3 cut       the first components of each matrix turn, at frequencies of d_rope; others stand
//   4 PCA       keys that stand, as large as the values on average, and values: one latent
//   5 absorb    the matrices go into W_Q; queries take the change of scale
//
// Exact are 0 and 1. Exact too are 2 with fold = 1; 3 where every component turns
// (d_rope = Hkv d) or those that do not are zero; 4 where kv_rank is the rank of what it is taken
// of. MLA has no more than one key with position for all heads: with each frequency once in it,
// as published models have it, GQA converts exactly only if its heads' keys are multiples of one
// another, frequency by frequency. Rope::copies lets frequencies repeat, up to the merged form.
//
// Biases, RoPE stretched to longer contexts, and norms of queries or keys have no place here.

/// How far to go.
struct Conversion {
  Index kv_rank = 512;
  Index d_rope = 64;   ///< a divisor of the head's dim, or a multiple up to all key heads
  Index fold = 0;      ///< FreqFold; 0: as few frequencies as d_rope allows
  double balance = 1;  ///< of the latent's PCA: above 1 keys weigh more, below 1 values
};

/// Why this conversion is none, in one line with the fix; nothing if it is sound.
std::optional<std::string> complaint(const GqaSizes& sizes, const Conversion& conversion);

/// What a conversion leads to: kv_rank and d_rope as wished, d_nope and d_v the head's dim (d_nope
/// 1, and zero, where every component turns), no compression of queries. GQA has no RMSNorm: with
/// epsilon 2^60 and kv_gamma 2^30 that of MLA is the identity, to float rounding, while the RMS of
/// a latent is below 2^17.
LatentSizes converted_sizes(const GqaSizes& sizes, const Conversion& conversion);

/// Keys of all heads as pairs (re, im) in another basis. Group g is the `fold` frequencies from
/// g fold on; its components are numbered m, and the pair of key head j and frequency g fold + f
/// is row j fold + f of its matrix.
struct MergedKeys {
  Index fold = 1;
  Index copies = 1;            ///< copies of all frequencies that components can turn at
  Index spacing = 1;           ///< every so many-th frequency only is turned at; divides `fold`
  Index turning = 0;           ///< components of a group that turn, the first ones
  std::vector<double> u = {};  ///< [groups, kv_heads fold, kv_heads fold], components as columns

  /// Pairs of d_rope: component m of a group turns as pair `pair` of copy `copy`.
  Index copy_of(Index m) const { return m / (fold / spacing); }
  Index pair_of(Index group, Index m) const {
    return group * (fold / spacing) + m % (fold / spacing);
  }
};

/// Step 0: every component turns, at its own frequency.
MergedKeys merged_keys(const GqaSizes& sizes);

/// Step 1 (fold 1) and, with larger ones, 2: the components of the keys of calibration tokens
/// [tokens, 1, model], the largest variance first. Every component turns, at its own frequency
/// (fold 1) or at one of the group's. The published damping adds a multiple of the identity to the
/// Gram matrix, which changes no eigenvector, and is left out. Throws std::invalid_argument where
/// there are no tokens or numbers that are not finite.
MergedKeys concentrated_keys(const GqaWeights& weights, View<const float> calibration, Index fold);

/// Step 3.
/// @pre complaint() has none, `keys` are of its fold
MergedKeys cut_keys(const GqaSizes& sizes, MergedKeys keys, const Conversion& conversion);

/// The fold that a conversion means.
Index fold_of(const GqaSizes& sizes, const Conversion& conversion);

/// As gqa_reference, with keys in another basis: what a step does to a layer, in double.
std::vector<double> merged_reference(const GqaWeights& weights, const MergedKeys& keys,
                                     View<const float> x, Index queries);

/// Steps 4 and 5: the weights of the whole layer as MLA. Throws as concentrated_keys.
LatentWeights absorbed_weights(const GqaWeights& weights, const MergedKeys& cut,
                               const Conversion& conversion, View<const float> calibration);

/// All steps.
LatentWeights converted(const GqaWeights& weights, const Conversion& conversion,
                        View<const float> calibration);

/// The layer with fewer key heads, kv_heads of them, as MHA to GQA or GQA to fewer: neighbouring
/// key heads become one. Its keys are the first components of theirs, frequency by frequency, which
/// commutes with RoPE and goes into W_Q; its values their leading principal components, whose basis
/// goes into W_O. Approximate, unless keys and values of a group span no more. The result has
/// neighbours as pairs. Throws as concentrated_keys.
/// Source: Effectively Compress KV Heads for LLM (arXiv 2406.07056, 2024), with RoRoPE's basis for
/// the keys in place of an SVD of whole heads, which RoPE would not pass.
/// @pre kv_heads divides the layer's
GqaWeights grouped(const GqaWeights& weights, Index kv_heads, View<const float> calibration);

}  // namespace dattn
