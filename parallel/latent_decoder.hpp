#pragma once

#include <functional>

#include "kernels/latent/weights.hpp"
#include "parallel/all_reduce.hpp"
#include "parallel/decoder.hpp"
#include "parallel/latent_down.hpp"

namespace dattn {

class PartialValues;

/// Where W_UV is applied if tokens are split: to what all ranks' Partials have merged to, by each
/// rank for the heads that it gets; or to Partials, by each rank for all heads, so that d_v numbers
/// of a head travel in place of kv_rank (latent_values.hpp).
enum class Values { after, before };

inline const char* name_of(Values where) { return where == Values::before ? "before" : "after"; }

/// Where the time of a step went, in seconds, and what was sent.
struct LatentTimes {
  double seconds = 0;  ///< whole step
  double project = 0;  ///< cache rows, queries, values and output
  double gather = 0;   ///< exchanges of what ranks made in parts: see DownProjections
  double reduce = 0;   ///< the all-reduce of y
  RunTimes attention;
  Index bytes_sent = 0;     ///< of all of these
  Index between_hosts = 0;  ///< of these, to other hosts
  Index messages = 0;
  Index envelopes = 0;  ///< beside messages; in no other figure
};

/// What it took to hand a cache over, of this rank.
struct HandOver {
  double seconds = 0;
  Index bytes_sent = 0;
  Index between_hosts = 0;  ///< of these
  Index messages = 0;
  Index envelopes = 0;  ///< in none of these
};

/// Hidden states of some tokens of a sequence, counted from the first of its prefixes: writes x
/// [tokens, model].
using Hidden = std::function<void(std::size_t sequence, const Runs& tokens, float* x)>;

/// Weights of a layer, for some of its heads; the whole latent.
using MakeWeights = std::function<LatentWeights(Range heads)>;

/// Decoding of one layer of multi-head latent attention over ranks: absorbed queries meet a cache
/// of latents (kernels/latent), split as one of decode_forms() says; W_UV and W_O of the heads that
/// a rank gets, and one all-reduce of y. All ranks construct and step together; a rank makes just
/// its part of the weights.
///
/// W_DKV is on every rank, so that each can fill() the rows of its own tokens; a step makes them as
/// DownProjections do. Forms that split tokens make some queries on every rank of a group (helix,
/// tree), or make each once and gather them (sequence).
template <comm::Transport T>
class LatentDecoder {
 public:
  /// `type` of the decoding is that of cache and queries, f4 or bf16, as `weight_type` is. Throws
  /// as Decoder; `hosts` are where the ranks are.
  /// @pre complaint(sizes) is empty, and complaint(decoding) of latent_decoding(); `values` are
  /// `before` the merge in form sequence only
  LatentDecoder(const LatentSizes& sizes, const MakeWeights& weights, const Decoding& decoding,
                const Strategy& form, std::optional<Mesh> mesh, T& transport, EngineOptions options,
                Type weight_type = Type::f4, const Hosts& hosts = {},
                Values values = Values::after);
  ~LatentDecoder();

  Decoder<T>& decoder() { return decoder_; }

  /// Writes the rows of all prefixes and of the tokens [0, lengths[s]) behind them of each sequence
  /// into the cache: what a prefill leaves behind. No message.
  void fill(std::span<const Index> lengths, const Hidden& hidden);

  /// As fill(), from the rows of the cache that a prefill of `lengths` left on each rank
  /// (LatentPrefill::rows): one exchange, in which every rank gets what its form has of them.
  /// Collective.
  HandOver take(std::span<const std::byte> rows, std::span<const Index> lengths);

  /// As fill(), but with numbers in [-1, 1) that cost little to draw, for benches.
  void draw(std::span<const Index> lengths);

  /// One step: sequence s has lengths[s] tokens with the new ones, whose hidden states are x
  /// [sequences * queries, model] on every rank. Writes y [sequences * queries, model], the same on
  /// every rank.
  LatentTimes step(std::span<const Index> lengths, View<const float> x, std::span<float> y);

  /// Heads of which this rank has the LSE, and that of the last step: [sequences * queries, heads].
  const Ranges& gets() const { return values_ ? decoder_.asks() : decoder_.gets(); }
  std::span<const float> lse() const { return lse_; }

  /// Bytes of the rows that hold so many tokens of each sequence.
  Index cache_bytes(std::span<const Index> lengths) {
    return decoder_.cache().bytes(lengths, decoder_.decoding());
  }

 private:
  template <class E>
  View<E> rows_of(const Run& positions);
  template <class E>
  void write(const Stretch& stretch, const Run& positions, const Hidden& hidden);
  template <class E>
  void append(std::span<const Index> lengths);
  std::vector<int> owners();
  std::vector<float> attend(std::span<const Index> lengths, LatentTimes& times);
  template <class E>
  void make_queries(std::span<const Index> lengths);

  T& transport_;
  bool verifies_;
  AllReduce<T> all_reduce_;
  Work work_;
  Decoder<T> decoder_;
  LatentSizes sizes_;
  std::unique_ptr<const PartialValues> values_;  ///< where W_UV comes before the merge
  StoredWeights weights_;                        ///< without W_DQ
  DownProjections<T> down_;
  std::vector<float> lse_;  ///< of the last step
};

/// Decoding in the absorbed form: one key head of kv_rank + d_rope numbers, whose first kv_rank are
/// the value.
Decoding latent_decoding(const LatentSizes& sizes, std::vector<Index> capacity, Index queries,
                         Type type);

}  // namespace dattn
