#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "comm/communicator.hpp"
#include "comm/memory.hpp"
#include "comm/operation.hpp"
#include "comm/strip.hpp"

namespace dattn::comm {

/// A Transport over a Communicator, in which ranks of one host need no MPI for their messages: the
/// receiver takes the bytes from where they lie in the sender's memory, copying them once, or looks
/// at them there. That needs memory of allocate(); what lies elsewhere, messages to other hosts and
/// collectives go through the Communicator. All messages are rendezvous: a send is complete when
/// its receive has begun and has taken the bytes. Errors and waits are those of Communicator.
class Windows {
 public:
  class Request;

  struct Options {
    bool on = true;  // else everything goes through the Communicator
    /// Ranks with the same number count as one host; without it, those that share memory do.
    std::optional<int> host = std::nullopt;
  };

  /// Bytes that this rank has sent to other ranks of its host as views and as copies, and to other
  /// hosts, since this was made. What is in none of them went through MPI within the host.
  struct Moved {
    std::int64_t viewed = 0;
    std::int64_t copied = 0;
    std::int64_t abroad = 0;
  };

  /// Collective. `ranks` must outlive this, and have no messages of others meanwhile.
  Windows(Communicator& ranks, const Options& options);
  Windows(Windows&&) noexcept;
  Windows& operator=(Windows&&) noexcept;
  ~Windows();

  int rank() const;
  int size() const;
  /// Whether `peer` is another rank that sees memory of allocate().
  bool shares(int peer) const;
  /// Why ranks of this host do not see each other's memory though they should; else empty.
  const std::string& trouble() const;

  /// Memory that ranks of this host can see, or, where the system does not give any, ordinary
  /// memory; pages come where they are first touched.
  Memory allocate(std::int64_t bytes);

  /// Starts a message, as Communicator does, through which it goes if it has another tag than 0;
  /// it is then in none of Moved.
  Request send(const ConstStrips& strips, int peer, int tag = 0);
  Request send(const Strips& strips, int peer, int tag = 0);
  Request recv(const Strips& strips, int peer, int tag = 0);

  /// A send of bytes that stay as they are until give_back(): the receiver may look at them.
  Request lend(const ConstStrips& strips, int peer);
  /// A receive that may have view() instead of writing to `strips`: if the sender lends the bytes,
  /// and they lie there in one strip, contiguous or in pieces of `piece` bytes.
  Request borrow(const Strips& strips, int peer, std::int64_t piece);
  /// Collective: nobody looks at what he has borrowed any more. Returns, on ranks that have lent,
  /// when the others of the host have got here as well.
  void give_back();

  Moved moved() const;

  /// How many OpenMP threads copy, outside of parallel regions; without this, one.
  void copy_with(int threads);

  void all_reduce(std::span<std::byte> records, std::int64_t record_bytes,
                  const Operation& operation);
  void barrier();
  /// Collective: a group for collectives, whose messages all go through MPI.
  Windows split(int color, int key);
  void poll();

 private:
  struct Impl;
  struct Message;
  explicit Windows(std::shared_ptr<Impl> impl) noexcept;

  std::shared_ptr<Impl> impl_;
};

/// A message in flight, as comm::Request. Of one that is dropped in flight nothing is touched any
/// more, but what follows it throws.
class [[nodiscard]] Windows::Request {
 public:
  Request() noexcept;
  Request(Request&& other) noexcept;
  Request& operator=(Request&& other) noexcept;
  ~Request();

  bool test();
  void wait();
  std::string describe() const;

  /// Once it is done: where the bytes lie, if they were borrowed. Theirs until give_back().
  const std::optional<ConstStrip>& view() const { return view_; }

 private:
  friend class Windows;
  Request(std::shared_ptr<Impl> impl, std::shared_ptr<Message> message) noexcept;
  void abandon() noexcept;

  std::shared_ptr<Impl> impl_;
  std::shared_ptr<Message> message_;
  std::optional<ConstStrip> view_;
};

}  // namespace dattn::comm
