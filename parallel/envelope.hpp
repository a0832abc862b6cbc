#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "comm/transport.hpp"
#include "parallel/engine.hpp"
#include "parallel/verifying.hpp"

namespace dattn {

/// What the sender of a message says of it, in a message of its own beside it: which Block it is,
/// and what its bytes are.
struct Envelope {
  std::uint64_t digest = 0;     ///< XXH3-64 of the bytes as they travel; 0 without digests
  std::int64_t bytes = 0;       ///< so many
  std::int64_t number = 0;      ///< of the run's messages from this sender to this receiver, from 0
  std::uint64_t block = 0;      ///< a hash of the Block's text
  std::int32_t from = 0;        ///< rank
  std::int32_t step = 0;        ///< of the sender's Program
  std::int32_t pass = 0;        ///< Pass
  std::int32_t run = 0;         ///< of the engine, from 1
  std::array<char, 72> name{};  ///< the Block's text, or the front of it; ends with 0
  std::uint64_t seal = 0;       ///< XXH3-64 of all that stands above; 0 without digests
};
static_assert(sizeof(Envelope) == kEnvelopeBytes);

/// Envelopes travel by this tag, messages by 0: the k-th of a channel goes with its k-th message.
inline constexpr int kEnvelopeTag = 1;

/// Of a message of so many bytes that is called `name`; not sealed yet.
Envelope envelope_of(const std::string& name, std::int64_t bytes);
/// The digest of its bytes is known, so that it can leave.
void seal(Envelope& envelope, std::uint64_t digest);
/// Throws Corruption, which begins with `message` (what it is and from whom), unless the envelope
/// is as it was sealed.
void require_intact(const Envelope& envelope, const std::string& message);
/// The same unless the message's bytes have this digest. `when` says what they are, or were.
void require_digest(const Envelope& envelope, std::uint64_t digest, const std::string& message,
                    const char* when = "it is");

/// One rank's envelopes of a Program: those it sends, and those that it holds against what it gets.
class Envelopes {
 public:
  /// Messages say which Block they are; with `digests` also what their bytes are. `program` must
  /// outlive this. @pre without comm::has_digest() no digests
  Envelopes(const Program& program, bool digests);

  bool digests() const { return digests_; }
  /// A run begins.
  void start();

  /// What goes beside the message of step `i`, a Send of so many bytes; stays where it is until the
  /// next run. Not sealed yet.
  Envelope& write(int i, std::int64_t bytes);
  /// Where what goes beside the message of step `i`, a Recv, is to arrive.
  Envelope& expect(int i);

  /// Throws std::runtime_error if the envelope of step `i`, which has arrived, is of another
  /// message than the Recv is for; Corruption if it is not as it was sent.
  void check_identity(int i) const;
  /// Throws Corruption unless the message's bytes have this digest.
  void check_bytes(int i, std::uint64_t digest) const;
  /// The same of bytes that had it before: they have been looked at where they lie.
  void check_still(int i, std::uint64_t digest) const;

  const Envelope& at(int i) const { return all_[static_cast<std::size_t>(i)]; }

  /// Memory in bytes, as envelope_bytes() has it.
  Index bytes() const;

 private:
  /// What came with the Recv of step `i`, and from where.
  std::string message(int i) const;

  const Program& program_;
  bool digests_;
  int run_ = 0;
  std::vector<Envelope> all_;             ///< by step
  std::vector<std::int64_t> expected_;    ///< by step: number
  std::vector<std::int64_t> sent_, got_;  ///< by peer: messages of this run
};

/// Collective over `group`, in which this rank of the job is `rank`: throws Corruption on all ranks
/// unless all have the same bytes. @pre comm::has_digest()
template <comm::Transport T>
void require_same_bytes(T& group, int rank, std::span<const std::byte> bytes);

}  // namespace dattn
