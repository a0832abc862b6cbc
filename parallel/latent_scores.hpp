#pragma once

#include <span>
#include <vector>

#include "parallel/latent_decoder.hpp"

namespace dattn {

/// Rows of a step, sequence after sequence, that see a stretch: those of its sequences.
inline Range rows_of(const Stretch& stretch, Index queries) {
  return {stretch.sequences.begin * queries, stretch.sequences.end * queries};
}

/// Some keys of a stretch, whose scores are made for all rows that see it: those of a prefix once
/// for all sequences that share it.
struct ScorePiece {
  std::size_t stretch;  ///< which of Decoding::stretches()
  Range keys;           ///< positions in the cache
  Index first;          ///< where its scores begin in the message
};

/// Pieces whose scores are added up over the slices by one message: [rows, heads, keys] each.
struct ScoreBatch {
  std::vector<ScorePiece> pieces;
  Index scores = 0;
};

/// All keys of all stretches, in order, as messages of up to 2^18 scores; where rows and heads are
/// so many that these would be of few keys, of 256 keys at least.
std::vector<ScoreBatch> score_batches(std::span<const Stretch> stretches, Index queries,
                                      Index heads);

/// Scores of the largest batch of any step of `heads` heads, at most.
Index most_scores(const Decoding& decoding, Index heads);

/// Attention of a slice of the latent: its scores are part of a sum over `slices`, then one softmax
/// is the same on all of them. q [rows, heads, latent + d_rope]; `rows` of the cache [positions, 1,
/// latent + d_rope], as far as they are filled; o [rows, heads, latent] and lse [rows, heads].
/// `work.score.scale` is that of the sizes. Collective over the slices.
template <class E, comm::Transport T>
void attend_by_sums(AllReduce<T>& slices, const Decoding& decoding, std::span<const Index> lengths,
                    View<const float> q, View<const E> rows, View<float> o, std::span<float> lse,
                    const Work& work, LatentTimes& times);

}  // namespace dattn
