#pragma once

#include <span>
#include <vector>

#include "kernels/attend.hpp"
#include "parallel/plan.hpp"
#include "parallel/reserved.hpp"

namespace dattn {

struct Decoding;

/// What each new token sees of a batch under the masks of its sequences: token t of a sequence is
/// query t and key t of its mask, and sees no token behind it nor of another sequence. `lengths`
/// are the tokens of each sequence, the new ones among them.
/// @pre decoding.masks has one for each sequence
MaskPtr seen_of_batch(const Decoding& decoding, std::span<const Index> lengths);

/// All that a batch at its capacity has before each new token, heads told apart where their masks
/// differ: what is seen in any step, whatever its lengths, is some of it, so that a proof for it
/// stands for all steps.
MaskPtr may_be_seen(const Decoding& decoding);

/// A rank's part of a KV cache under masks: each group of heads that see the same keeps, of each
/// sequence, the tokens that a query to come may see, and lets go of the others. Tokens lie side by
/// side in the order of their positions. Those that are let go of take room until they are a
/// sixteenth of the tokens there; then the others close up, and pages behind them go back.
class RaggedCache {
 public:
  /// @pre the Problem is decoding_problem()'s, under masks. Throws std::bad_alloc where there is no
  /// address space
  RaggedCache(const Decoding& decoding, const Problem& problem, const Program& program);

  /// The next query of the sequence will be that of token `next`, no earlier one: what none from
  /// there on sees is let go of. @pre it does not go back
  void advance(std::size_t sequence, Index next);
  /// Whether this rank is to keep a token of the sequence, for any head.
  bool wants(std::size_t sequence, Index token) const;
  /// Takes a token, of which `k` [key heads, d_qk] and `v` [value heads, d_v] have all heads, for
  /// those heads that keep it. @pre it is behind all others of the sequence
  void append(std::size_t sequence, Index token, const std::byte* k, const std::byte* v);

  /// Tokens that are kept, of all sequences, by key head of the whole; 0 for heads of others.
  std::vector<Index> tokens() const;
  /// Bytes of what is kept, and of what has not closed up yet besides.
  Index bytes() const;
  Index held_bytes() const;

  /// out <- out merged with attention of the batch's queries, the last tokens of sequences of these
  /// lengths, to what is there. q [sequences * queries, heads, d_qk] and out, their records, have
  /// the query heads `heads`.
  template <class E>
  void attend(View<const E> q, View<float> out, const Ranges& heads, std::span<const Index> lengths,
              const Work& work) const;

 private:
  /// Neighbouring query heads of this rank that see the same, in one sequence.
  struct Part {
    std::size_t sequence;
    Range heads, key_heads, value_heads;
    Index k_row, v_row;  ///< bytes of a token
    Reserved k{}, v{};
    std::vector<Index> tokens{};  ///< ascending
    Ranges kept{};                ///< tokens that the queries to come may see
    Index live = 0;               ///< of `tokens`, those among `kept`
    Index next = -1;
  };

  /// Those of the sequence.
  std::span<Part> parts(std::size_t sequence);
  std::span<const Part> parts(std::size_t sequence) const;

  const Decoding& decoding_;
  const Problem& problem_;
  std::vector<Index> firsts_;  ///< position of each sequence's first token
  std::vector<bool> own_;      ///< by position: this rank keeps it, if any head does
  std::size_t each_ = 0;       ///< parts of a sequence
  std::vector<Part> parts_;    ///< those of sequence 0 first
};

/// Bytes that a rank keeps of all tokens from the first query, at `context` of each sequence, to
/// the last, at most.
Index ragged_bytes(const Decoding& decoding, const Problem& problem, const Program& program,
                   std::span<const Index> context);

}  // namespace dattn
