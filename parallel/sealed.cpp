#include "parallel/sealed.hpp"

#include <stdexcept>
#include <utility>

#include "comm/digest.hpp"
#include "kernels/check.hpp"

namespace dattn {

template <comm::Transport T>
SealedMessages<T>::SealedMessages(T& transport, std::string what, bool verify,
                                  std::vector<int> ranks)
    : transport_(transport), what_(std::move(what)), verify_(verify), ranks_(std::move(ranks)) {
  CHECK(!verify || comm::has_digest());
}

template <comm::Transport T>
int SealedMessages<T>::rank_of(int member) const {
  return ranks_.empty() ? member : ranks_[static_cast<std::size_t>(member)];
}

template <comm::Transport T>
std::uint64_t SealedMessages<T>::digest(const comm::ConstStrips& bytes) const {
  return comm::digest_of(bytes, [this] { transport_.poll(); });
}

template <comm::Transport T>
void SealedMessages<T>::send(const comm::ConstStrips& bytes, int peer) {
  Message& message = messages_.emplace_back(
      Message{peer, {}, nullptr, transport_.send(bytes, peer), typename T::Request()});
  if (!verify_) return;
  // Its bytes are on their way meanwhile.
  Envelope& envelope = beside_.emplace_back(envelope_of(what_, comm::total(bytes)));
  envelope.from = rank_of(transport_.rank());
  seal(envelope, digest(bytes));
  message.envelope = &envelope;
  message.beside =
      transport_.send(comm::strips_of(std::as_bytes(std::span(&envelope, 1))), peer, kEnvelopeTag);
  ++envelopes_;
}

template <comm::Transport T>
void SealedMessages<T>::recv(const comm::Strips& into, int peer) {
  Message& message = messages_.emplace_back(Message{
      peer, comm::read_only(into), nullptr, transport_.recv(into, peer), typename T::Request()});
  if (!verify_) return;
  message.envelope = &beside_.emplace_back();
  message.beside = transport_.recv(
      comm::strips_of(std::as_writable_bytes(std::span(message.envelope, 1))), peer, kEnvelopeTag);
}

template <comm::Transport T>
void SealedMessages<T>::wait() {
  for (Message& message : messages_) {
    message.bytes.wait();
    message.beside.wait();
    if (message.envelope != nullptr && !message.received.empty()) check(message);
  }
  messages_.clear();
  beside_.clear();
}

template <comm::Transport T>
void SealedMessages<T>::check(const Message& message) const {
  const Envelope& envelope = *message.envelope;
  const std::string text = what_ + " from rank " + std::to_string(rank_of(message.peer));
  require_intact(envelope, text);
  const Envelope due = envelope_of(what_, comm::total(message.received));
  if (envelope.block != due.block || envelope.bytes != due.bytes ||
      envelope.from != rank_of(message.peer)) {
    throw std::runtime_error("rank " + std::to_string(envelope.from) + " sent " +
                             std::string(envelope.name.data()) + " (" +
                             std::to_string(envelope.bytes) + " bytes) where " + text + " (" +
                             std::to_string(due.bytes) + " bytes) was due");
  }
  require_digest(envelope, digest(message.received), text);
}

template class SealedMessages<comm::Communicator>;
template class SealedMessages<comm::Windows>;
template class SealedMessages<comm::Loopback::Endpoint>;

}  // namespace dattn
