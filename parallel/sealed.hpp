#pragma once

#include <deque>
#include <span>
#include <string>
#include <vector>

#include "comm/transport.hpp"
#include "kernels/range.hpp"
#include "parallel/envelope.hpp"

namespace dattn {

/// Messages that no Program has: those of all-reduces, pseudo-keys and layers of latent attention.
/// With `verify` each has an Envelope beside it, and its bytes are held against that before wait()
/// returns; without, they are plain messages.
template <comm::Transport T>
class SealedMessages {
 public:
  /// `what` they are, as complaints say it; the same on both ends. `ranks` of the job are the
  /// transport's, which must outlive this; none: as they are. @pre without comm::has_digest() no
  /// `verify`
  SealedMessages(T& transport, std::string what, bool verify, std::vector<int> ranks = {});

  /// Starts a message. Its bytes stay where and as they are until wait().
  void send(const comm::ConstStrips& bytes, int peer);
  void recv(const comm::Strips& into, int peer);

  /// Until all are there. Throws Corruption for bytes that are not as they were sent,
  /// std::runtime_error for a message of another kind; else errors are the transport's, and no wait
  /// is longer than its deadline.
  void wait();

  /// How many were sent so far.
  Index envelopes() const { return envelopes_; }

 private:
  struct Message {
    int peer;
    comm::ConstStrips received;  ///< where; nothing of a send
    Envelope* envelope;          ///< null: without
    typename T::Request bytes, beside;
  };

  void check(const Message& message) const;
  std::uint64_t digest(const comm::ConstStrips& bytes) const;
  int rank_of(int member) const;

  T& transport_;
  std::string what_;
  bool verify_;
  std::vector<int> ranks_;
  std::deque<Envelope> beside_;  ///< does not move what it has
  std::vector<Message> messages_;
  Index envelopes_ = 0;
};

}  // namespace dattn
