#pragma once

#include <optional>
#include <span>
#include <vector>

#include "comm/transport.hpp"
#include "parallel/reduction.hpp"

namespace dattn {

/// Sums over a group of ranks, on all of them, as a Reduction says: on one host the transport's own
/// all-reduce, on several messages of this rank to and from others, on a channel of their own. Not
/// while an exception unwinds; no wait is longer than the transport's deadline.
template <comm::Transport T>
class AllReduce {
 public:
  /// Collective over all of `transport`, which must outlive this. Each rank names the group that it
  /// is in, in an order that all of the group share; `hosts` are of the transport's ranks.
  AllReduce(T& transport, std::vector<int> group, const Hosts& hosts);

  /// Bytes that a rank has sent, and of these to other hosts.
  struct Sent {
    Index bytes = 0;
    Index between_hosts = 0;
  };

  /// How many ranks the group has.
  int ranks() const { return static_cast<int>(group_.size()); }

  /// Connects the group's ranks alone.
  T& transport() { return part_ ? *part_ : *transport_; }

  /// Where the members of the group are, by their places in it.
  Hosts hosts() const;

  /// Takes the memory that so many records need, once, rather than when they come.
  void reserve(Index records, Index record_bytes);

  /// Collective over the group: its ranks' records become their sum. Errors are the transport's.
  /// @pre `records` are a multiple of record_bytes > 0, as many on all; the operation commutes if
  /// the group is on several hosts
  Sent operator()(std::span<std::byte> records, Index record_bytes,
                  const comm::Operation& operation);

 private:
  void over_hosts(const Reduction& how, std::span<std::byte> records, Index record_bytes,
                  const comm::Operation& operation);

  T* transport_;
  std::vector<int> group_;
  Hosts hosts_;
  int here_;                  ///< place in the group
  std::optional<T> part_;     ///< the group, if it is not all ranks
  std::optional<T> channel_;  ///< of all ranks, where there are several hosts
  std::vector<std::byte> scratch_;
};

/// The ranks 0 to ranks - 1.
std::vector<int> all_ranks(int ranks);

}  // namespace dattn
