#pragma once

#include <optional>
#include <span>
#include <vector>

#include "comm/transport.hpp"
#include "parallel/reduction.hpp"

namespace dattn {

/// Sums over a group of ranks, on all of them, as a Reduction says: on one host the transport's own
/// all-reduce, on several messages of this rank to and from others, on a channel of their own. One
/// that verifies has messages of its own on one host, too, holds each of them against its Envelope
/// before it adds it up, and in the end the sums of all ranks against each other's. Not while an
/// exception unwinds; no wait is longer than the transport's deadline.
template <comm::Transport T>
class AllReduce {
 public:
  /// Collective over all of `transport`, which must outlive this. Each rank names the group that it
  /// is in, in an order that all of the group share; `hosts` are of the transport's ranks.
  /// @pre without comm::has_digest() none that verifies
  AllReduce(T& transport, std::vector<int> group, const Hosts& hosts, bool verifies = false);

  /// Bytes that a rank has sent, of these to other hosts, and Envelopes, which are in neither.
  struct Sent {
    Index bytes = 0;
    Index between_hosts = 0;
    Index envelopes = 0;
  };

  /// How many ranks the group has, and which of the job they are.
  int ranks() const { return static_cast<int>(group_.size()); }
  const std::vector<int>& group() const { return group_; }
  bool verifies() const { return verifies_; }

  /// Connects the group's ranks alone.
  T& transport() { return part_ ? *part_ : *transport_; }

  /// Where the members of the group are, by their places in it.
  Hosts hosts() const;

  /// Takes the memory that so many records need, once, rather than when they come.
  void reserve(Index records, Index record_bytes);

  /// Collective over the group: its ranks' records become their sum. Errors are the transport's,
  /// and Corruption.
  /// @pre `records` are a multiple of record_bytes > 0, as many on all; the operation commutes if
  /// the group is on several hosts
  Sent operator()(std::span<std::byte> records, Index record_bytes,
                  const comm::Operation& operation);

 private:
  Index by_messages(const Reduction& how, std::span<std::byte> records, Index record_bytes,
                    const comm::Operation& operation);

  T* transport_;
  std::vector<int> group_;
  Hosts hosts_;
  bool verifies_;
  int here_;                  ///< place in the group
  std::optional<T> part_;     ///< the group, if it is not all ranks
  std::optional<T> channel_;  ///< of all ranks, where messages are ours
  std::vector<std::byte> scratch_;
};

/// The ranks 0 to ranks - 1.
std::vector<int> all_ranks(int ranks);

}  // namespace dattn
