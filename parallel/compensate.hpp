#pragma once

#include <optional>
#include <vector>

#include "comm/transport.hpp"
#include "kernels/bfloat.hpp"
#include "kernels/score.hpp"
#include "kernels/view.hpp"
#include "parallel/all_reduce.hpp"
#include "parallel/pseudo_keys.hpp"
#include "parallel/sealed.hpp"

namespace dattn {

/// One rank's part in making the pseudo-keys of a Problem, over a transport, and attention to them.
/// An Engine has one and calls sum(), start(), wait() and merge() in each forward run; whoever has
/// K, V and a Partial without an Engine may do so too. E is the element type of Q, K and V, the
/// same in all calls. What comes of it is the same on all ranks, for every strategy: `head` up to
/// the order in which the ranks' sums are added, all of them kept in double.
template <comm::Transport T>
class Compensation {
 public:
  /// With `verifies` what ranks send is held against its Envelope, and in the end they compare what
  /// they have. @pre `problem` outlives this; without comm::has_digest() none that verifies
  Compensation(const Problem& problem, int rank, bool verifies = false);

  /// Sums up what is dropped of the rank's own rows, in their order. k [own keys, key heads, d_qk],
  /// v [own keys, value heads, d_v]
  template <class E>
  void sum(View<const E> k, View<const E> v, int threads);

  /// What start() puts on the wire: bytes counted from the messages themselves, an all-reduce as
  /// AllReduce does; messages to other ranks, and collectives.
  struct Sent {
    Index bytes = 0;
    Index between_hosts = 0;  ///< of these, to other hosts
    Index messages = 0;
    Index envelopes = 0;  ///< in none of these
  };
  /// Collective: starts to exchange what was summed up, before any other message of a run. Errors
  /// are the transport's.
  template <class E>
  Sent start(T& transport);
  /// Collective where it verifies: until what start() has sent and asked for is there. Throws
  /// Corruption. No wait is longer than the transport's deadline.
  void wait(T& transport);

  /// out <- out merged with attention of q to all pseudo-keys. q [rows, query heads, d_qk], any
  /// rows of Q with all heads; out [rows, query heads, d_v + 2], their records. @pre as
  /// attend_pseudo_keys
  template <class E>
  void merge(View<const E> q, View<SumOf<E>> out, const Score& score, int threads);

 private:
  /// The numbers of the pseudo-keys, d_qk + d_v each, by entry and rank.
  template <class Sum>
  std::vector<Sum>& numbers();

  const Problem& problem_;
  int rank_;
  bool verifies_;
  std::size_t length_;  ///< of a pseudo-key, in numbers
  std::vector<PseudoKey> all_;
  std::vector<Index> counts_;  ///< of all_
  std::vector<double> sums_;   ///< of the rank's own keys, or of all after start(); by entry
  std::vector<float> floats_;
  std::vector<double> doubles_;
  std::optional<AllReduce<T>> all_reduce_;     ///< of sums_, once started
  std::optional<SealedMessages<T>> messages_;  ///< under way
};

}  // namespace dattn
