#include "parallel/envelope.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "comm/digest.hpp"
#include "kernels/check.hpp"

namespace dattn {
namespace {

/// All ranks run the same program (see signature.hpp), so it is the same hash everywhere.
std::uint64_t hash_of(const std::string& text) { return std::hash<std::string>{}(text); }

std::uint64_t seal_of(const Envelope& envelope) {
  return comm::digest_of(std::as_bytes(std::span(&envelope, 1)).first(offsetof(Envelope, seal)));
}

[[noreturn]] void complain(const std::string& message, const char* what, std::uint64_t got,
                           std::uint64_t sent) {
  throw Corruption(message + " is not what was sent: " + what + " corrupted, XXH3-64 " +
                   comm::digest_text(got) + " where the sender had " + comm::digest_text(sent) +
                   "; memory or the network changed it: look at both hosts");
}

/// Ranks that have the same bytes, or the first two that do not.
struct Sameness {
  std::uint64_t digest;
  std::uint64_t other_digest;
  std::int64_t rank;   // the first
  std::int64_t other;  // the first with other bytes; -1: none
};

void compare(const std::byte* in, std::byte* inout, std::int64_t records, std::int64_t) {
  for (std::int64_t i = 0; i < records; ++i) {
    Sameness low, high;
    std::memcpy(&low, in + i * static_cast<std::int64_t>(sizeof low), sizeof low);
    std::memcpy(&high, inout + i * static_cast<std::int64_t>(sizeof high), sizeof high);
    if (low.other < 0 && low.digest != high.digest) {
      low.other = high.rank;
      low.other_digest = high.digest;
    } else if (low.other < 0) {
      low.other = high.other;
      low.other_digest = high.other_digest;
    }
    std::memcpy(inout + i * static_cast<std::int64_t>(sizeof low), &low, sizeof low);
  }
}

}  // namespace

Envelope envelope_of(const std::string& name, std::int64_t bytes) {
  Envelope envelope;
  envelope.bytes = bytes;
  envelope.block = hash_of(name);
  name.copy(envelope.name.data(), envelope.name.size() - 1);
  return envelope;
}

void seal(Envelope& envelope, std::uint64_t digest) {
  envelope.digest = digest;
  envelope.seal = seal_of(envelope);
}

void require_intact(const Envelope& envelope, const std::string& message) {
  const std::uint64_t seal = seal_of(envelope);
  if (seal != envelope.seal) complain(message, "what comes beside it is", seal, envelope.seal);
}

void require_digest(const Envelope& envelope, std::uint64_t digest, const std::string& message,
                    const char* when) {
  if (digest != envelope.digest) complain(message, when, digest, envelope.digest);
}

Envelopes::Envelopes(const Program& program, bool digests)
    : program_(program),
      digests_(digests),
      all_(program.steps.size()),
      expected_(program.steps.size()) {
  CHECK(!digests || comm::has_digest());
  int peers = 0;
  for (const Step& step : program.steps) {
    if (const auto* send = std::get_if<Send>(&step)) peers = std::max(peers, send->peer + 1);
    if (const auto* recv = std::get_if<Recv>(&step)) peers = std::max(peers, recv->peer + 1);
  }
  sent_.resize(static_cast<std::size_t>(peers));
  got_.resize(static_cast<std::size_t>(peers));
}

void Envelopes::start() {
  ++run_;
  std::fill(sent_.begin(), sent_.end(), 0);
  std::fill(got_.begin(), got_.end(), 0);
}

Envelope& Envelopes::write(int i, std::int64_t bytes) {
  const auto& send = std::get<Send>(program_.steps[static_cast<std::size_t>(i)]);
  Envelope& envelope = all_[static_cast<std::size_t>(i)];
  envelope = envelope_of(text(send.block), bytes);
  envelope.number = sent_[static_cast<std::size_t>(send.peer)]++;
  envelope.from = program_.rank;
  envelope.step = i;
  envelope.pass = static_cast<std::int32_t>(program_.pass);
  envelope.run = run_;
  return envelope;
}

Envelope& Envelopes::expect(int i) {
  const auto at = static_cast<std::size_t>(i);
  const auto& recv = std::get<Recv>(program_.steps[at]);
  expected_[at] = got_[static_cast<std::size_t>(recv.peer)]++;
  return all_[at];
}

void Envelopes::check_identity(int i) const {
  const Envelope& envelope = at(i);
  if (digests_) require_intact(envelope, message(i));
  const auto& recv = std::get<Recv>(program_.steps[static_cast<std::size_t>(i)]);
  const std::int64_t expected = expected_[static_cast<std::size_t>(i)];
  const auto words = [](std::int64_t number, int pass, int run) {
    return "message " + std::to_string(number) + " of " +
           std::string(name_of(static_cast<Pass>(pass))) + " run " + std::to_string(run);
  };
  if (envelope.block == hash_of(text(recv.block)) && envelope.number == expected &&
      envelope.from == recv.peer && envelope.pass == static_cast<std::int32_t>(program_.pass) &&
      envelope.run == run_) {
    return;
  }
  // Without a seal nothing says that these are a Pass and a text.
  const int pass = envelope.pass == static_cast<int>(Pass::backward) ? envelope.pass : 0;
  std::string name = envelope.name.data();
  if (envelope.name.back() != 0) name.assign(envelope.name.data(), envelope.name.size());
  throw std::runtime_error("rank " + std::to_string(envelope.from) + " sent " + name + " (" +
                           words(envelope.number, pass, envelope.run) + ", its step " +
                           std::to_string(envelope.step) + ") where " + text(recv.block) + " (" +
                           words(expected, static_cast<int>(program_.pass), run_) + ") of rank " +
                           std::to_string(recv.peer) + " was due");
}

void Envelopes::check_bytes(int i, std::uint64_t digest) const {
  require_digest(at(i), digest, message(i));
}

void Envelopes::check_still(int i, std::uint64_t digest) const {
  require_digest(at(i), digest, message(i), "while it was looked at in the sender's memory it was");
}

Index Envelopes::bytes() const {
  const std::size_t numbers = expected_.capacity() + sent_.capacity() + got_.capacity();
  return static_cast<Index>(all_.capacity() * sizeof(Envelope) + numbers * sizeof(std::int64_t));
}

std::string Envelopes::message(int i) const {
  const auto& recv = std::get<Recv>(program_.steps[static_cast<std::size_t>(i)]);
  return text(recv.block) + " from rank " + std::to_string(recv.peer) + " (its step " +
         std::to_string(at(i).step) + ")";
}

template <comm::Transport T>
void require_same_bytes(T& group, int rank, std::span<const std::byte> bytes) {
  Sameness all{comm::digest_of(bytes), 0, rank, -1};
  group.all_reduce(std::as_writable_bytes(std::span(&all, 1)), sizeof all,
                   comm::operation<compare>(false));
  if (all.other < 0) return;
  throw Corruption("what ranks have after an all-reduce is not the same: XXH3-64 " +
                   comm::digest_text(all.other_digest) + " on rank " + std::to_string(all.other) +
                   " where rank " + std::to_string(all.rank) + " has " +
                   comm::digest_text(all.digest) +
                   "; memory or the network changed it: look at both hosts");
}

template void require_same_bytes(comm::Communicator&, int, std::span<const std::byte>);
template void require_same_bytes(comm::Windows&, int, std::span<const std::byte>);
template void require_same_bytes(comm::Loopback::Endpoint&, int, std::span<const std::byte>);

}  // namespace dattn
