#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kernels/prefix_tree.hpp"
#include "parallel/decode_forms.hpp"
#include "parallel/engine.hpp"
#include "parallel/ragged_cache.hpp"
#include "parallel/rehearse.hpp"
#include "parallel/reserved.hpp"

namespace dattn {

struct Served;

/// Tokens that follow one another in the cache and in the sequences that have them: a prefix, or
/// what a sequence has of its own.
struct Stretch {
  Range keys;        ///< positions in the cache
  Range sequences;   ///< that have these tokens
  Index before = 0;  ///< tokens that each of them has before these

  std::size_t sequence() const { return static_cast<std::size_t>(sequences.begin); }
  /// Whether these tokens see those of `other`, as far as they stand before them.
  bool sees(const Stretch& other) const {
    return other.sequences.contains(sequences) && other.before <= before;
  }
  /// Of tokens of the stretch at `positions` in the cache: how many each has before it in a
  /// sequence.
  Run tokens(const Run& positions) const {
    return {positions.first - keys.begin + before, positions.count, positions.step};
  }
};

/// What is decoded: a batch of sequences, each with its part of one KV cache. Sequences may share
/// prefixes, each of which is cached once; lengths and capacities are then of what follows them.
struct Decoding {
  std::vector<Index> capacity;  ///< tokens that each sequence may reach
  Index queries = 1;            ///< new tokens of each sequence in a step
  Index query_heads = 1;
  Index key_heads = 1;
  Index value_heads = 1;
  Index d_qk = 1;
  Index d_v = 1;
  /// V is the first d_v numbers of K, where they lie (latent attention in its absorbed form).
  bool values_in_keys = false;
  Type type = Type::f4;                    ///< of Q and the cache
  std::vector<PrefixLevel> prefixes = {};  ///< levels of a PrefixTree of these sequences
  /// What the tokens of each sequence see, for as many queries and keys as its capacity; sequences
  /// of one capacity had best share one. None: all that is before them. Not with prefixes.
  std::vector<MaskPtr> masks = {};
  /// How fast the ranks read what they keep: the faster the more tokens. Of a mesh of tokens x
  /// heads.
  Speeds speeds = {};

  /// Tokens of all prefixes, level by level: they come first.
  Index shared() const;
  /// Those, and behind them the tokens of all sequences, one behind the other.
  Index keys() const;
  /// Position of the first token of a sequence.
  Index first(std::size_t sequence) const;
  /// Tokens of the prefixes of a sequence: its own ones come behind them.
  Index before(std::size_t sequence) const;
  /// The prefixes, and behind them `lengths` tokens of each sequence.
  std::vector<Stretch> stretches(std::span<const Index> lengths) const;
  /// Positions of the tokens that the token `token` of a sequence sees: its prefixes, and its
  /// sequence up to itself; ascending.
  std::vector<Range> seen(std::size_t sequence, Index token) const;
};

/// Why nobody can decode this, in one line with the fix; nothing if it is sound.
std::optional<std::string> complaint(const Decoding& decoding);

/// The problem of a step in which every sequence has reached its capacity: any other step allows
/// fewer pairs of it. Tokens are dealt to ranks in turn, so that every rank has as many of each
/// sequence, however long it has grown; of unequal speeds its share, where ranks that split heads
/// count as fast as the slowest of them, since they read the same tokens. @pre complaint(decoding)
/// is empty
Problem decoding_problem(const Decoding& decoding, const Mesh& mesh);

/// A rank's part of the cache: what its Program starts with. Address space for the capacity is
/// taken at once; the system gives pages as rows are written, so that appending moves nothing.
class KvCache {
 public:
  /// Throws std::bad_alloc where there is no address space.
  KvCache(const Problem& problem, const Program& program, bool values_in_keys);

  /// The row of the token at `position`, if this rank has it.
  std::optional<Index> row_of(Index position) const;
  /// Numbers of a row, to be written: keys [heads, d_qk] or values [heads, d_v] of its own heads.
  std::byte* keys(Index row);
  /// @pre values do not lie in the keys
  std::byte* values(Index row);
  const std::byte* keys() const { return memory_[0].get(); }
  const std::byte* values() const { return memory_[1].get(); }
  Index row_bytes(Kind kind) const;
  /// Heads of K, or of V, that lie here.
  const Ranges& heads(Kind kind) const;
  /// Bytes of the rows that hold the prefixes and these tokens of each sequence.
  Index bytes(std::span<const Index> lengths, const Decoding& decoding) const;

 private:
  Block blocks_[2];  ///< of K and V
  Index row_bytes_[2];
  Reserved memory_[2];
  bool values_in_keys_;
  std::vector<Index> rows_;  ///< by position; -1 where another rank has it
};

/// Decoding on one rank: the plan of a form, proved once; the cache; the engine. All ranks
/// construct and step together.
template <comm::Transport T>
class Decoder {
 public:
  /// Throws std::invalid_argument where the form refuses, std::logic_error with the Fault where the
  /// plan does not stand. `hosts` are where the ranks are. Without `merges` ranks are left with
  /// Partials (partials_program), for the caller to merge. @pre complaint(decoding) is empty;
  /// `transport` outlives this; what is not merged is of form sequence
  Decoder(const Decoding& decoding, const Strategy& form, std::optional<Mesh> mesh, T& transport,
          EngineOptions options, const Hosts& hosts = {}, bool merges = true);

  const Decoding& decoding() const { return decoding_; }
  const Problem& problem() const { return problem_; }
  const Program& program() const { return plan_[static_cast<std::size_t>(rank_)]; }
  const Rehearsal& rehearsal() const { return rehearsal_; }
  /// The cache; under masks that which is ragged, else that which is not.
  KvCache& cache() { return *cache_; }
  RaggedCache* ragged() { return ragged_ ? &*ragged_ : nullptr; }

  /// Query heads whose queries this rank makes, and those whose O it gets.
  const Ranges& asks() const;
  const Ranges& gets() const;

  /// Memory for the queries of a step: [sequences * queries, heads of asks(), d_qk].
  std::span<std::byte> queries();

  /// Attends: of sequence s there are lengths[s] tokens in the cache, the new ones among them.
  /// Collective; the same lengths on all ranks. @pre queries <= lengths[s] <= capacity[s]
  RunTimes step(std::span<const Index> lengths);

  /// Of the last step: O [sequences * queries, heads of gets(), d_v] and LSE.
  void result(std::span<float> o, std::span<float> lse) const { engine_->result(o, lse); }

 private:
  /// What the engine calls for the cache that is ragged.
  auto attends_ragged() const -> decltype(EngineOptions::attend);
  /// What it calls where scores go by distance: tokens lie in the cache sequence by sequence, and
  /// how far apart two of them are is said by their places in a sequence.
  auto attends_by_distance() const -> decltype(EngineOptions::attend);
  template <class E>
  void attend_by_distance(const Attend& step, const std::byte* q, std::byte* out, const Served& s,
                          const Mask& up_to_itself, const Work& work) const;

  Decoding decoding_;
  int rank_;
  Problem problem_;
  Rehearsal rehearsal_;
  Plan plan_;
  std::optional<KvCache> cache_;
  std::optional<RaggedCache> ragged_;
  MaskPtr filled_;
  std::vector<Index> lengths_;  ///< of the step at hand
  std::unique_ptr<Engine<T>> engine_;
};

}  // namespace dattn
