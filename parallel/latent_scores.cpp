#include "parallel/latent_scores.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/check.hpp"
#include "kernels/latent/product.hpp"
#include "parallel/latent_parts.hpp"

namespace dattn {
namespace {

constexpr Index kScores = 1 << 18;  ///< of a message, unless that is
constexpr Index kKeys = 256;        ///< fewer keys than these: products want more

}  // namespace

std::vector<ScoreBatch> score_batches(std::span<const Stretch> stretches, Index queries,
                                      Index heads) {
  std::vector<ScoreBatch> all;
  if (heads == 0) return all;
  for (std::size_t s = 0; s < stretches.size(); ++s) {
    const Index lanes = rows_of(stretches[s], queries).size() * heads;
    const Index end = stretches[s].keys.end;
    for (Index key = stretches[s].keys.begin; key < end;) {
      const Index least = std::min(end - key, kKeys);
      if (all.empty() || all.back().scores + lanes * least > kScores) all.emplace_back();
      ScoreBatch& batch = all.back();
      const Index room = std::max(least, (kScores - batch.scores) / lanes);
      const Range keys{key, std::min(end, key + room)};
      batch.pieces.push_back({s, keys, batch.scores});
      batch.scores += lanes * keys.size();
      key = keys.end;
    }
  }
  return all;
}

Index most_scores(const Decoding& decoding, Index heads) {
  const std::vector<Stretch> stretches = decoding.stretches(decoding.capacity);
  const auto lanes = [&](const Stretch& s) { return rows_of(s, decoding.queries).size() * heads; };
  Index most = kScores;
  for (const Stretch& stretch : stretches) most = std::max(most, lanes(stretch) * kKeys);
  Index scores = 0;  // of all batches, or `most`
  for (const Stretch& stretch : stretches) {
    const Index each = lanes(stretch);
    if (each == 0) continue;
    if (stretch.keys.size() > (most - scores) / each) return most;
    scores += each * stretch.keys.size();
  }
  return scores;
}

namespace {

/// The softmax of some rows and heads as it goes over keys: its maximum, and the sum of weights.
struct Softmax {
  float most = -std::numeric_limits<float>::infinity();
  double sum = 0;

  /// Takes the first `seen` of these scores, which become weights, the others zeros; `o` is what
  /// has been summed up with the weights before.
  void take(std::span<float> scores, Index seen, float scale, std::span<float> o) {
    const auto some = scores.first(static_cast<std::size_t>(seen));
    float top = most;
    for (float& score : some) top = std::max(top, score *= scale);
    if (top > most) {
      const float down = std::exp(most - top);
      sum *= static_cast<double>(down);
      for (float& x : o) x *= down;
      most = top;
    }
    for (float& score : some) sum += static_cast<double>(score = std::exp(score - most));
    std::fill(scores.begin() + seen, scores.end(), 0.0F);
  }
};

}  // namespace

template <class E, comm::Transport T>
void attend_by_sums(AllReduce<T>& slices, const Decoding& decoding, std::span<const Index> lengths,
                    View<const float> q, View<const E> rows, View<float> o, std::span<float> lse,
                    const Work& work, LatentTimes& times) {
  const Index heads = q.heads;
  const Index latent = o.dim;
  const Index each = decoding.queries;
  if (heads == 0) return;  // none of these slices' ranks has any
  CHECK(q.dense() && o.dense() && q.dim == rows.dim, q.dim, rows.dim);
  CHECK(static_cast<Index>(lse.size()) == q.rows * heads, lse.size(), q.rows, heads);
  const std::vector<Stretch> stretches = decoding.stretches(lengths);
  const std::vector<ScoreBatch> batches = score_batches(stretches, each, heads);
  Index most = 0;
  for (const ScoreBatch& batch : batches) most = std::max(most, batch.scores);
  std::vector<float> scores(static_cast<std::size_t>(most));
  std::vector<Softmax> softmax(lse.size());
  std::fill_n(o.data, o.size(), 0.0F);
  for (const ScoreBatch& batch : batches) {
    // Scores of the numbers [first, first + inner) of queries and keys.
    const auto products = [&](Index first, Index inner, bool add) {
      std::vector<Product> all;
      for (const ScorePiece& piece : batch.pieces) {
        const Range asking = rows_of(stretches[piece.stretch], each);
        all.push_back({.a = q.at(asking.begin, 0) + first,
                       .a_stride = q.dim,
                       .b = rows.at(piece.keys.begin, 0) + first,
                       .b_stride = rows.row_stride(),
                       .transposed = true,
                       .c = scores.data() + piece.first,
                       .c_stride = piece.keys.size(),
                       .rows = asking.size() * heads,
                       .columns = piece.keys.size(),
                       .inner = inner,
                       .add = add});
      }
      return all;
    };
    double from = seconds_now();
    multiply(products(0, latent, false), work);
    times.attention.compute += seconds_now() - from;
    times.attention.wait +=
        add_up(slices, std::span(scores).first(static_cast<std::size_t>(batch.scores)), times);
    from = seconds_now();
    multiply(products(latent, q.dim - latent, true), work);  // whole on every slice
    for (const ScorePiece& piece : batch.pieces) {
      const Stretch& stretch = stretches[piece.stretch];
      const Range asking = rows_of(stretch, each);
      const Index keys = piece.keys.size();
      const bool is_own = stretch.keys.begin >= decoding.shared();
      float* score = scores.data() + piece.first;
      for (Index row = asking.begin; row < asking.end; ++row) {
        const Index last = stretch.keys.end - each + row % each;  // that it sees, if it is its own
        const Index seen = is_own ? std::clamp<Index>(last + 1 - piece.keys.begin, 0, keys) : keys;
        for (Index head = 0; head < heads; ++head, score += keys) {
          softmax[static_cast<std::size_t>(row * heads + head)].take(
              {score, static_cast<std::size_t>(keys)}, seen, static_cast<float>(work.score.scale),
              {o.at(row, head), static_cast<std::size_t>(latent)});
        }
      }
      const Product of_values[] = {{.a = scores.data() + piece.first,
                                    .a_stride = keys,
                                    .b = rows.at(piece.keys.begin, 0),
                                    .b_stride = rows.row_stride(),
                                    .c = o.at(asking.begin, 0),
                                    .c_stride = latent,
                                    .rows = asking.size() * heads,
                                    .columns = latent,
                                    .inner = keys,
                                    .add = true}};
      multiply(of_values, work);
    }
    times.attention.compute += seconds_now() - from;
  }
  float* sum = o.data;
  for (std::size_t lane = 0; lane < lse.size(); ++lane) {
    const auto total = static_cast<float>(softmax[lane].sum);
    for (Index d = 0; d < latent; ++d) *sum++ /= total;
    lse[lane] =
        static_cast<float>(static_cast<double>(softmax[lane].most) + std::log(softmax[lane].sum));
  }
}

#define DATTN_ATTEND_BY_SUMS(E, T)                                                              \
  template void attend_by_sums(AllReduce<T>&, const Decoding&, std::span<const Index>,          \
                               View<const float>, View<const E>, View<float>, std::span<float>, \
                               const Work&, LatentTimes&);
DATTN_ATTEND_BY_SUMS(float, comm::Communicator)
DATTN_ATTEND_BY_SUMS(BFloat16, comm::Communicator)
DATTN_ATTEND_BY_SUMS(float, comm::Loopback::Endpoint)
DATTN_ATTEND_BY_SUMS(BFloat16, comm::Loopback::Endpoint)
#undef DATTN_ATTEND_BY_SUMS

}  // namespace dattn
