#pragma once

#include "comm/communicator.hpp"
#include "launcher/scores.hpp"
#include "launcher/tensors.hpp"
#include "parallel/latent_decoder.hpp"

namespace dattn {

/// How far the last step of decoding is off, relative in the Frobenius norm over all ranks.
struct DecodeVerdict {
  double error = 0;
  double bound = 0;
  bool passed() const { return error <= bound; }  // a NaN does not pass
};

/// Generated hidden states: standard normal, the same for every number of ranks.
Hidden hidden_states(Index model, const Decoding& decoding, std::int64_t seed);

/// Hidden states from a file that has those of every token that may come, in the order of the
/// cache.
Hidden hidden_states(std::shared_ptr<const NpyReader> file, const Decoding& decoding);

/// Q, K and V of every token that may come.
class DecodeTensors {
 public:
  /// `source` has them in the order of the cache, sequence after sequence.
  DecodeTensors(const Decoding& decoding, Source source)
      : decoding_(decoding), source_(std::move(source)) {}

  /// Writes what this rank caches of all prefixes.
  void append_prefixes(Decoder<comm::Communicator>& decoder) const;
  /// Writes what this rank caches of some tokens of a sequence.
  void append(Decoder<comm::Communicator>& decoder, std::size_t sequence, Range tokens) const;
  /// Writes the queries that this rank makes, of the last tokens of each sequence.
  void ask(Decoder<comm::Communicator>& decoder, std::span<const Index> lengths) const;
  const Source& source() const { return source_; }

 private:
  void append_at(Decoder<comm::Communicator>& decoder, Range positions) const;
  template <class E>
  void append_ragged(RaggedCache& cache, std::size_t sequence, Range tokens) const;
  template <class E>
  void append_as(Decoder<comm::Communicator>& decoder, Range positions) const;
  template <class E>
  void ask_as(Decoder<comm::Communicator>& decoder, std::span<const Index> lengths) const;

  Decoding decoding_;
  Source source_;
};

/// Collective: O of the heads that each rank got in the last step against attention in double.
DecodeVerdict check_heads(comm::Communicator& world, const Decoder<comm::Communicator>& decoder,
                          const DecodeTensors& tensors, std::span<const Index> lengths,
                          const Scoring& scoring);

/// Collective: y [sequences * queries, model] of the last step against the whole layer in double,
/// from the hidden states of all tokens; sequences are dealt to the ranks.
DecodeVerdict check_latent(comm::Communicator& world, const MakeWeights& make,
                           const Decoding& decoding, std::span<const Index> lengths,
                           const Hidden& hidden, std::span<const float> y);

/// Collective: y of the tokens of `lengths` that each rank prefilled (LatentPrefill::y) against the
/// layer in double.
DecodeVerdict check_prefill(comm::Communicator& world, const MakeWeights& make,
                            const Decoding& decoding, std::span<const Index> lengths,
                            const Hidden& hidden, std::span<const float> y);

}  // namespace dattn
