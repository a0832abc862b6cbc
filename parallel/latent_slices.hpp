#pragma once

#include <optional>

#include "parallel/latent_decoder.hpp"
#include "parallel/reserved.hpp"

namespace dattn {

/// How the latent is cut, and what stands for the numbers that a slice does not know.
struct Slicing {
  int slices = 1;  ///< g; the ranks are a multiple of it, and split the heads g by g
  /// Partial scores are added up over the slices before the softmax: exact, at the price of a
  /// message as long as the context. Else every slice has a softmax of its own (TPLA): APPROXIMATE.
  bool exact = true;
  enum class Basis { none, hadamard, pca };
  Basis basis = Basis::none;  ///< in which the latent is cut
  /// RMS of a latent: its own, which costs no message where W_DKV is on every rank; or, as TPLA has
  /// it, that of the slice by a factor fitted to calibration tokens.
  enum class Norm { exact, slice };
  Norm norm = Norm::exact;
  /// What the scores of a slice are multiplied by to stand for the whole: 1; one over its share of
  /// the energy; or the least squares of whole scores on its own. (TPLA prints the share itself,
  /// where its own condition asks for one over it.)
  enum class Factor { one, energy, fitted };
  Factor factor = Factor::fitted;
};

/// Why so many ranks cannot cut a latent so, with the fix; nothing if they can.
std::optional<std::string> complaint(const Slicing& slicing, const LatentSizes& sizes, int ranks);

/// The ranks that have slices of the heads of `rank`, in order.
std::vector<int> ranks_with_the_same_heads(int rank, int slices);

/// Numbers that they add up at a time, at most, where a step has `rows` (sequences * new tokens)
/// and they `heads`.
Index summed_over_slices(const Slicing& slicing, const LatentSizes& sizes, const Decoding& decoding,
                         Index rows, Index heads);

/// Memory in bytes that a step takes on a rank beside weights and cache, at most, likewise.
Index step_bytes(const Slicing& slicing, const LatentSizes& sizes, const Decoding& decoding,
                 Index rows, Index heads, int threads);

/// The weights folded, in the basis that the latent is cut in; `calibration` [tokens, model] is
/// what a PCA basis is fitted to.
LatentWeights in_basis(const LatentWeights& weights, const Slicing& slicing,
                       View<const float> calibration, const Work& work);

/// Decoding of one layer of latent attention whose latent is cut: a rank caches some dims of every
/// token, and the whole key with position.
///
/// W_UK and W_UV are cut with the latent. W_UQ and W_O are not, and ranks with the same heads share
/// them by heads: each makes the queries of some, and all-reduces the values of all before W_O.
/// Source: TPLA (arXiv 2508.15881, 2025), and its exact form (partial scores are added up).
template <comm::Transport T>
class SlicedDecoder {
 public:
  /// `calibration` [tokens, model]: hidden states that the basis and the factors are fitted to; the
  /// same on every rank. @pre complaint(slicing, sizes, ranks) is empty
  SlicedDecoder(const LatentSizes& sizes, const MakeWeights& weights, const Decoding& decoding,
                const Slicing& slicing, View<const float> calibration, T& transport,
                EngineOptions options, Type weight_type = Type::f4, const Hosts& hosts = {});

  /// As in LatentDecoder.
  void fill(std::span<const Index> lengths, const Hidden& hidden);
  void draw(std::span<const Index> lengths);
  /// As in LatentDecoder: each rank gets its slice of every row, and the key with position. The
  /// rows are of a prefill in_basis(); their RMS is that of the whole latent, whatever `norm` says.
  HandOver take(std::span<const std::byte> rows, std::span<const Index> lengths);
  LatentTimes step(std::span<const Index> lengths, View<const float> x, std::span<float> y);

  /// As in LatentDecoder; of exact slices, the first of which has it.
  Ranges gets() const;
  std::span<const float> lse() const { return lse_; }
  /// What this rank has of the weights.
  const LatentPart& part() const { return part_; }
  /// What the scores of this slice are multiplied by.
  double factor() const { return factor_; }
  /// The rows at these positions of the cache.
  std::span<const std::byte> cached(Range positions) const {
    return {row_at(positions.begin),
            static_cast<std::size_t>(positions.size() * row() * bytes_of(decoding_.type))};
  }
  /// Bytes of the rows that hold the prefixes and so many tokens of each sequence.
  Index cache_bytes(std::span<const Index> lengths) const;

 private:
  void calibrate(const LatentWeights& all, View<const float> calibration);
  template <class E>
  void write(const Run& positions, const Run& tokens, View<const float> c);
  void write_any(const Run& positions, const Run& tokens, View<const float> c);
  void make_queries(std::span<const Index> lengths, View<float> q, LatentTimes& times);
  void put_out(View<const float> o, View<float> y, LatentTimes& times);
  template <class E>
  void attend(std::span<const Index> lengths, View<const float> q, View<float> o, LatentTimes& t);
  Index row() const { return part_.latent.size() + sizes_.d_rope; }
  std::byte* row_at(Index position) const;

  T& transport_;
  AllReduce<T> all_reduce_;
  AllReduce<T> over_slices_;  ///< of the ranks with the same heads
  Decoding decoding_;
  Slicing slicing_;
  Work work_;
  Workspace workspace_;
  LatentSizes sizes_;
  LatentPart part_;
  Range own_;              ///< heads of part_ whose queries and W_O this rank has
  StoredWeights weights_;  ///< of part_, without W_DQ, W_UQ and W_O
  StoredWeights outer_;    ///< W_UQ and W_O of own_
  std::optional<DownProjections<T>> down_;
  double factor_ = 1;
  double rms_factor_ = 1;  ///< RMS of the latent over that of the slice
  Reserved cache_;
  std::vector<float> lse_;  ///< of the last step
};

}  // namespace dattn
