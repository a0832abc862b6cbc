#pragma once

// Private to comm/*.cpp: what hides MPI's handles from the public headers.

#include <mpi.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.hpp"
#include "comm/operation.hpp"
#include "comm/progress.hpp"
#include "comm/request.hpp"
#include "comm/strip.hpp"

namespace dattn::comm {

/// The one narrowing to MPI's int; throws std::length_error, naming `what`, if it does not fit.
int to_int(std::int64_t value, const char* what);

/// Whether MPI is finalised, so that no handle may be touched any more.
bool finalized() noexcept;

/// Owner of a committed datatype. Freeing one under a message is legal: MPI keeps it until then.
class Datatype {
 public:
  /// The strips at their absolute addresses (to be used with MPI_BOTTOM).
  explicit Datatype(const Strips& strips);
  /// One record of `bytes` bytes, which MPI never cuts.
  explicit Datatype(std::int64_t bytes);
  Datatype(const Datatype&) = delete;
  Datatype& operator=(const Datatype&) = delete;
  ~Datatype();
  MPI_Datatype get() const { return handle_; }

 private:
  MPI_Datatype handle_ = MPI_DATATYPE_NULL;
};

/// Owner of a user operation.
class Op {
 public:
  explicit Op(const Operation& operation);
  Op(const Op&) = delete;
  Op& operator=(const Op&) = delete;
  ~Op();
  MPI_Op get() const { return handle_; }

 private:
  MPI_Op handle_ = MPI_OP_NULL;
};

/// What a message of several pieces carries in front of the first: its whole length.
inline constexpr std::int64_t kFront = sizeof(std::int64_t);

/// Of the 32767 tags that MPI promises: messages have the first of these; those that ask for more
/// than the first piece have as many more for the other pieces, and for asking.
inline constexpr int kTags = 8192;

class Outbox;

/// A message of one or more pieces, or a collective (peer < 0).
/// A message of several pieces carries its whole length in front of the first piece: without that,
/// two sides that disagree by whole pieces would not notice.
/// Of a message that asks (`asks`), the sender gives MPI the first piece only, until the receiver,
/// which has posted all pieces, asks for the others, by a message without bytes.
struct Request::Impl {
  struct Piece {
    MPI_Request handle;
    std::int64_t bytes;  // expected, the length in front included
  };

  /// Gives MPI what it may have at once.
  void start();
  /// Of a send: gives MPI what it may have by now; whether that is all of it.
  bool advance();
  bool test();
  /// Cancels what can be cancelled; whether nothing is in flight any more.
  bool cancel() noexcept;
  std::string describe() const;

  const char* verb;  // "send", "receive", or a collective's name
  bool receives = false;
  bool synchronous = false;
  bool asks = false;
  MPI_Comm comm = MPI_COMM_NULL;
  int rank = 0;
  int peer = -1;
  int tag = 0;
  std::int64_t bytes = 0;
  std::int64_t limit = 0;
  double deadline = 0;
  int exceptions = 0;  // in flight when this was made
  Progress* progress = nullptr;
  std::shared_ptr<Outbox> outbox{};
  std::int64_t sequence = -1;  // of a collective, on its communicator
  std::int64_t length = 0;
  Strips strips{};
  std::vector<Piece> pieces{};
  std::size_t posted = 0;                   // pieces that MPI has or had
  std::size_t done = 0;                     // of these
  MPI_Request go_ahead = MPI_REQUEST_NULL;  // the receiver's, on both sides
  std::vector<std::shared_ptr<const void>> kept{};

 private:
  void post_next();
  void settle();
  void check_length(const Piece& piece, std::int64_t got) const;
};

struct Communicator::Impl {
  /// Takes ownership of `comm`.
  Impl(MPI_Comm comm, const Options& wanted);
  /// The same of a part of `whole`'s ranks.
  Impl(MPI_Comm comm, const Impl& whole);
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl();

  Request post(bool receives, const Strips& strips, int peer, int tag);
  /// Waits for a started collective; `kept` lives as long as MPI may touch it.
  void finish(MPI_Request started, const char* verb, std::int64_t bytes,
              std::shared_ptr<const void> kept = nullptr);

  MPI_Comm handle;
  int rank = 0;
  int size = 0;
  Options options;
  int exceptions;
  Progress* progress = nullptr;
  std::vector<int> hosts{};          // by rank
  std::shared_ptr<Outbox> outbox{};  // one for all that are split off each other
  std::int64_t collectives = 0;      // so far
  bool broken = false;               // a collective on it failed and may still be under way
};

}  // namespace dattn::comm
