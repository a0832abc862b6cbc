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

/// A message of one or more pieces, or a collective (peer < 0).
/// A message of several pieces carries its whole length in front of the first piece: without that,
/// two sides that disagree by whole pieces would not notice.
struct Request::Impl {
  struct Piece {
    MPI_Request handle;
    std::int64_t bytes;  // expected, the length in front included
  };

  bool test();
  /// Cancels what can be cancelled; whether nothing is in flight any more.
  bool cancel() noexcept;
  std::string describe() const;

  const char* verb;  // "send", "receive", or a collective's name
  bool receives = false;
  int rank = 0;
  int peer = -1;
  int tag = 0;
  std::int64_t bytes = 0;
  std::int64_t limit = 0;
  double deadline = 0;
  int exceptions = 0;  // in flight when this was made
  Progress* progress = nullptr;
  std::int64_t sequence = -1;  // of a collective, on its communicator
  std::int64_t length = 0;
  std::vector<Piece> pieces{};
  std::size_t done = 0;
  std::vector<std::shared_ptr<const void>> kept{};

 private:
  void check_length(const Piece& piece, std::int64_t got) const;
};

struct Communicator::Impl {
  /// Takes ownership of `comm`.
  Impl(MPI_Comm comm, const Options& wanted);
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
  std::int64_t collectives = 0;  // so far
  bool broken = false;  // a collective on it failed and may still be under way
};

}  // namespace dattn::comm
