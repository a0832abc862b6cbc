#pragma once

#include <span>

#include "kernels/attend.hpp"
#include "kernels/latent/sizes.hpp"

namespace dattn {

/// The values of the absorbed form: the first `latent` numbers of the rows of the cache, where they
/// lie.
template <class T>
View<const T> latent_values(View<const T> rows, Index latent) {
  return {rows.data, rows.rows, 1, latent, rows.row_stride()};
}

/// Work with the scale of the sizes: 1 / sqrt(d_nope + d_rope), not of the width of the rows.
Work scaled(Work work, const LatentSizes& sizes);

/// out <- out merged with attention in the absorbed form: q [tokens, heads, latent + d_rope], rows
/// of the cache [keys, 1, latent + d_rope], out [tokens, heads, latent + 2] (records). `where` has
/// absorbed_shape(); work.score is to be scaled().
template <class T>
void attend_latent(View<const T> q, View<const T> rows, View<float> out, const Where& where,
                   const Mask& mask, const Work& work);

/// A sequence of a batch in decoding: its cache, and how many of its last rows are new tokens that
/// ask now.
template <class T>
struct LatentSequence {
  View<const T> rows;  ///< [tokens so far, 1, latent + d_rope], the new ones among them
  Index queries = 1;
};

/// Decoding of a batch: q [sum of the new tokens, heads, latent + d_rope], sequence by sequence;
/// out [as many, heads, latent + 2] <- out merged with causal attention of each to its own rows.
///
/// One call of attend for each sequence: the heads of a token read one cache, so a single token has
/// 16 to 128 lanes, which fill panels by themselves; a common call would put tokens of several
/// sequences into a panel, half of which is then masked. All threads share each sequence.
template <class T>
void decode_latent(const LatentSizes& sizes, View<const T> q,
                   std::span<const LatentSequence<T>> batch, View<float> out, const Work& work);

}  // namespace dattn
