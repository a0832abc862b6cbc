#pragma once

#include "kernels/latent/weights.hpp"
#include "parallel/latent_decoder.hpp"
#include "parallel/prefill_plan.hpp"

namespace dattn {

/// The tokens of a sequence that a rank prefills, counted from the sequence's first: those at its
/// own_positions(), so that all have as many and, under a causal mask, as much to compute.
Run own_tokens(const Decoding& decoding, std::size_t sequence, Index length, int ranks, int rank);

/// Memory in bytes that a prefill takes on a rank beside its weights, at most.
Index prefill_bytes(const LatentSizes& sizes, const Decoding& decoding,
                    std::span<const Index> lengths, int ranks, int threads);

/// Prefill of one layer of multi-head latent attention: every sequence attends to itself, causally;
/// a prefix that sequences share is prefilled once.
/// Tokens are split over the ranks; each has all heads of its tokens. The latents go around a ring,
/// kv_rank + d_rope numbers a token, by a plan that is proved and an engine (prefill_plan.hpp); K
/// and V of the heads are expanded from them where they arrive, some keys and heads at a time (192
/// and 128 numbers a head in DeepSeek's models). Q, K and V are of the type of the cache; sums are
/// float32. Queries and Partials are there for some heads at a time; the latents that have come are
/// kept for the heads that follow.
template <comm::Transport T>
class LatentPrefill {
 public:
  /// `weights` have all heads and the whole latent, in the basis that the cache is to have; the
  /// decoding says how tokens are dealt and what the cache's elements are, `weight_type` those of
  /// the weights, `hosts` where the ranks are. Throws std::logic_error where the plan does not
  /// stand. @pre `transport` outlives this
  LatentPrefill(const LatentSizes& sizes, LatentWeights weights, const Decoding& decoding,
                std::vector<Index> lengths, T& transport, EngineOptions options,
                Type weight_type = Type::f4, const Hosts& hosts = {});
  LatentPrefill(const LatentPrefill&) = delete;  // the engine calls this one

  /// Makes the rows of the cache of the own tokens, and what their queries are made from. No
  /// message.
  void make(const Hidden& hidden);

  /// Attends, and makes y; then weights and all that attention took are gone. Collective.
  LatentTimes run();

  /// What this rank does; no step where there is no token at all.
  const Program& program() const { return program_; }

  /// Rows of the cache of the own tokens, stretch after stretch (Decoding::stretches): [tokens,
  /// kv_rank + d_rope], elements of the decoding's type.
  std::span<const std::byte> rows() const { return rows_; }
  /// y [tokens, model] of the own tokens, likewise.
  std::span<const float> y() const { return y_; }

 private:
  template <class E>
  void make_as(const Hidden& hidden);
  template <class E>
  void ask(Range heads);
  template <class E>
  void meet(const std::byte* block, int owner, Range heads, const Work& work);
  void put_out(Range heads);
  Index tokens_of(int rank) const;
  std::size_t block_bytes(int rank) const;

  LatentSizes sizes_;
  StoredWeights weights_;
  Decoding decoding_;
  std::vector<Index> lengths_;
  std::vector<Stretch> stretches_;
  T& transport_;
  Work work_;
  Workspace workspace_;
  std::vector<std::byte> rows_;
  std::vector<float> c_q_;      ///< what queries are made from, [tokens, q_width]
  std::vector<std::byte> q_;    ///< [tokens, heads at a time, d_qk], of the type of the cache
  std::vector<float> records_;  ///< [tokens, heads at a time, d_v + 2]
  std::vector<float> y_;
  bool keeps_;
  std::optional<Problem> problem_;  ///< none where there is no token
  Program program_;
  std::unique_ptr<Engine<T>> engine_;
  Range asking_;  ///< heads whose queries are there
};

}  // namespace dattn
