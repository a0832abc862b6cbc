#pragma once

#include <span>
#include <vector>

#include "kernels/attend.hpp"
#include "kernels/latent/weights.hpp"

namespace dattn {

// The parts of a latent attention layer beside attention. Rows of tokens are [tokens, 1, numbers];
// Head Ranges are global and lie in weights.part.heads; tensors of heads hold just those heads.
// Matrix products sum in float32 (product.hpp), on work.threads threads; bits depend on the sizes
// and, of bfloat16 weights, on the instruction set, not on the threads. W, the element of the
// weights, and T are float or BFloat16. Of `work` only threads, poll and isa count here.

/// sqrt(mean of the squares + epsilon) of each row of x [rows, 1, numbers], summed in double.
void rms_of(View<const float> x, double epsilon, std::span<float> rms);

/// out = x / rms * gamma, row by row; `out` may be x. Empty `gamma`: 1.
/// Source: RMSNorm (Zhang, Sennrich 2019).
void rms_norm(View<const float> x, std::span<const float> rms, std::span<const float> gamma,
              View<float> out);

/// The same by the rows' own RMS.
void rms_norm(View<const float> x, double epsilon, std::span<const float> gamma, View<float> out);

/// The angles of RoPE at the positions of some rows. Pairs are neighbours, (x[2i], x[2i + 1]), as
/// DeepSeek trains them; its published Python code also sorts the turned numbers into halves, of
/// queries and keys alike, which no score notices.
class RopeAngles {
 public:
  RopeAngles(const LatentSizes& sizes, const Runs& positions);

  /// Turns the d_rope numbers x by the position of row `row`, in place.
  void turn(Index row, float* x) const;

 private:
  Index pairs_;
  std::vector<float> cos_, sin_;  ///< [rows][pairs]
};

/// x [tokens, 1, model] -> c, k_r [tokens, 1, columns + d_rope]: latents before RMSNorm, and keys
/// before RoPE.
template <class W>
void latents(const LatentWeightsOf<W>& weights, View<const float> x, View<float> c,
             const Work& work);

/// What latents() gave -> rows of the cache [tokens, 1, latent + d_rope]: the latent dims
/// part.latent after RMSNorm and gamma, and the key after RoPE. T is float or BFloat16. `rms` is
/// that of the whole latent of each token, epsilon included; empty: computed here, from all
/// columns.
/// @pre rms is given, or the weights hold all columns
template <class T, class W>
void cache_rows(const LatentWeightsOf<W>& weights, View<const float> c, std::span<const float> rms,
                const Runs& positions, View<T> rows);

/// Both: x [tokens, 1, model] -> rows of the cache [tokens, 1, latent + d_rope].
/// @pre the weights hold all columns
template <class T, class W>
void latent_rows(const LatentWeightsOf<W>& weights, View<const float> x, const Runs& positions,
                 View<T> rows, const Work& work);

/// x [tokens, 1, model] -> what queries are made from [tokens, 1, q_width]: RMSNorm(x W_DQ) gamma,
/// or x itself where queries are not compressed.
template <class W>
void compressed_queries(const LatentWeightsOf<W>& weights, View<const float> x, View<float> c_q,
                        const Work& work);

/// compressed queries [tokens, 1, q_width] -> queries of the expanded form [tokens, heads, d_nope +
/// d_rope], after RoPE.
template <class W>
void expanded_queries(const LatentWeightsOf<W>& weights, Range heads, View<const float> c_q,
                      const Runs& positions, View<float> q, const Work& work);

/// Queries of the expanded form -> of the absorbed form [tokens, heads, latent + d_rope]: q_h
/// W_UK,h^T, then the part with position. T is float or BFloat16.
/// Source: DeepSeek-V2 (2024), section 2.1.2: W_UK absorbed into the queries.
template <class T, class W>
void absorb(const LatentWeightsOf<W>& weights, Range heads, View<const float> q, View<T> absorbed,
            const Work& work);

/// All three: x [tokens, 1, model] -> [tokens, heads, latent + d_rope].
template <class T, class W>
void absorbed_queries(const LatentWeightsOf<W>& weights, Range heads, View<const float> x,
                      const Runs& positions, View<T> absorbed, const Work& work);

/// Rows of the cache [tokens, 1, kv_rank + d_rope] -> keys [tokens, heads, d_nope + d_rope] and
/// values [tokens, heads, d_v] of the expanded form, for prefill: 320 products a pair of query and
/// key in place of 1,088 (DeepSeek-V3).
/// @pre the weights hold the whole latent
template <class T, class W>
void expand(const LatentWeightsOf<W>& weights, Range heads, View<const T> rows, View<float> k,
            View<float> v, const Work& work);

/// O of the absorbed form [tokens, heads, latent] -> O of the heads [tokens, heads, d_v]: L_h
/// W_UV,h. Over slices of the latent the results add up to the whole.
template <class W>
void up_values(const LatentWeightsOf<W>& weights, Range heads, View<const float> absorbed,
               View<float> o, const Work& work);

/// y [tokens, 1, model] += sum over `heads` of O_h W_O,h: over parts of the heads the results add
/// up to the whole.
template <class W>
void project_out(const LatentWeightsOf<W>& weights, Range heads, View<const float> o, View<float> y,
                 const Work& work);

/// Both: O of the absorbed form [tokens, heads, latent], added to y [tokens, 1, model].
template <class W>
void values_out(const LatentWeightsOf<W>& weights, Range heads, View<const float> absorbed,
                View<float> y, const Work& work);

}  // namespace dattn
