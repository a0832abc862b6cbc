#include "comm/request.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <utility>

#include "comm/error.hpp"
#include "comm/handles.hpp"
#include "comm/outbox.hpp"
#include "comm/wait.hpp"

namespace dattn::comm {
namespace {

/// Pieces of a message that MPI has and that are not done, at most: of each that does not fit the
/// socket it makes a copy.
constexpr std::size_t kUnderWay = 8;

}  // namespace

void Request::Impl::start() {
  post_next();
  if (!asks) {
    while (posted < pieces.size()) post_next();
    return;
  }
  if (!receives) {
    const int code = MPI_Irecv(nullptr, 0, MPI_BYTE, peer, tag + 2 * kTags, comm, &go_ahead);
    if (code != MPI_SUCCESS) throw Error(code, describe());
    outbox->add(*this);
    outbox->advance();  // the receiver may well have asked
    return;
  }
  while (posted < pieces.size()) post_next();
  const int code = MPI_Isend(nullptr, 0, MPI_BYTE, peer, tag + 2 * kTags, comm, &go_ahead);
  if (code != MPI_SUCCESS) throw Error(code, describe());
}

void Request::Impl::post_next() {
  Piece& next = pieces[posted];
  const auto number = static_cast<std::int64_t>(posted);
  Strips piece = cut(strips, number * limit, std::min(bytes, (number + 1) * limit));
  if (pieces.size() > 1 && number == 0) {
    piece.insert(piece.begin(), Strip{reinterpret_cast<std::byte*>(&length), 1, kFront, kFront});
  }
  const bool contiguous = piece.empty() || (piece.size() == 1 && piece.front().count == 1);
  void* data = MPI_BOTTOM;
  int count = 1;
  MPI_Datatype type = MPI_BYTE;
  std::unique_ptr<Datatype> strided;
  if (contiguous) {
    data = piece.empty() ? nullptr : piece.front().data;
    count = to_int(next.bytes, "message piece");
  } else {
    strided = std::make_unique<Datatype>(piece);
    type = strided->get();
  }
  // The first pieces of later messages overtake what has to be asked for.
  const int at = asks && number > 0 ? tag + kTags : tag;
  int code = MPI_SUCCESS;
  if (receives) {
    code = MPI_Irecv(data, count, type, peer, at, comm, &next.handle);
  } else if (synchronous) {
    code = MPI_Issend(data, count, type, peer, at, comm, &next.handle);
  } else {
    code = MPI_Isend(data, count, type, peer, at, comm, &next.handle);
  }
  if (code != MPI_SUCCESS) throw Error(code, describe());
  ++posted;
}

bool Request::Impl::advance() {
  if (go_ahead != MPI_REQUEST_NULL) {
    int complete = 0;
    const int code = MPI_Test(&go_ahead, &complete, MPI_STATUS_IGNORE);
    if (code != MPI_SUCCESS) throw Error(code, describe());
    if (complete == 0) return false;
  }
  for (; posted < pieces.size(); post_next()) {
    settle();
    if (posted - done >= kUnderWay) return false;
  }
  return true;
}

bool Request::Impl::test() {
  if (outbox) outbox->advance();
  settle();
  if (done < pieces.size() || go_ahead == MPI_REQUEST_NULL) return done == pieces.size();
  int complete = 0;
  check(MPI_Test(&go_ahead, &complete, MPI_STATUS_IGNORE));
  return complete != 0;
}

/// Finds out which pieces are done.
void Request::Impl::settle() {
  for (; done < posted; ++done) {
    Piece& piece = pieces[done];
    int complete = 0;
    MPI_Status status;
    const int code = MPI_Test(&piece.handle, &complete, &status);
    int got = 0;
    if (code == MPI_ERR_TRUNCATE) {
      piece.handle = MPI_REQUEST_NULL;
      MPI_Get_count(&status, MPI_BYTE, &got);
      check_length(piece, got);
    }
    if (code != MPI_SUCCESS) {
      piece.handle = MPI_REQUEST_NULL;
      throw Error(code, describe());
    }
    if (complete == 0) return;
    if (progress != nullptr) progress->moved();
    if (receives) {
      // MPI accepts a message that is too short without a word.
      check(MPI_Get_count(&status, MPI_BYTE, &got));
      check_length(piece, got);
    }
  }
}

void Request::Impl::check_length(const Piece& piece, std::int64_t got) const {
  const bool whole = pieces.size() == 1;
  if (got == piece.bytes) {
    if (!whole && &piece == pieces.data() && length != bytes) {
      throw Mismatch(peer, rank, bytes, length);
    }
    return;
  }
  // Only the first piece of a longer message is longer than the limit.
  if (whole && got == limit + kFront) throw Mismatch(peer, rank, bytes, limit, true);
  throw Mismatch(peer, rank, whole || done == 0 ? bytes : piece.bytes, got);
}

bool Request::Impl::cancel() noexcept {
  if (outbox) outbox->erase(*this);
  bool all = true;
  const auto end = [&](MPI_Request& handle, bool cancels) {
    if (handle == MPI_REQUEST_NULL) return;
    if (cancels) MPI_Cancel(&handle);
    int complete = 0;
    MPI_Status status;
    if (MPI_Test(&handle, &complete, &status) != MPI_SUCCESS) {
      handle = MPI_REQUEST_NULL;
    } else if (complete == 0) {
      all = false;
    }
  };
  for (Piece& piece : pieces) end(piece.handle, receives);
  end(go_ahead, !receives);
  return all;
}

std::string Request::Impl::describe() const {
  if (peer < 0) return fmt::format("{} of {} bytes at rank {}", verb, bytes, rank);
  return fmt::format("{} of {} bytes {} rank {} (tag {}) at rank {}", verb, bytes,
                     receives ? "from" : "to", peer, tag, rank);
}

Request::Request() noexcept = default;
Request::Request(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Request::Request(Request&& other) noexcept = default;
Request& Request::operator=(Request&& other) noexcept {
  // The message that was here is dropped as by the destructor.
  Request dropped(std::move(other));
  std::swap(impl_, dropped.impl_);
  return *this;
}
Request::~Request() {
  if (impl_) drop();
}

bool Request::test() {
  if (!impl_) return true;
  try {
    if (!impl_->test()) return false;
  } catch (...) {
    abandon();
    throw;
  }
  impl_.reset();
  return true;
}

void Request::wait() {
  if (!impl_ || (impl_->peer >= 0 && test())) return;  // every collective is noted
  const Waiting waiting(impl_->progress, impl_->verb, impl_->peer, impl_->bytes, impl_->sequence);
  wait_until(
      impl_->deadline, [this] { return test(); }, [this] { return describe(); });
}

void Request::keep(std::shared_ptr<const void> buffer) {
  if (impl_) impl_->kept.push_back(std::move(buffer));
}

std::string Request::describe() const { return impl_ ? impl_->describe() : "nothing"; }

/// Cancels; what MPI still holds is leaked together with the buffers that the request owns.
void Request::abandon() noexcept {
  if (finalized() || !impl_->cancel()) {
    static_cast<void>(impl_.release());
  } else {
    impl_.reset();
  }
}

void Request::drop() noexcept {
  // While an exception unwinds, the peer may be gone and a wait would hide the cause. A send may
  // then outlive the caller's bytes, which is why main must abort the job promptly.
  if (finalized() || std::uncaught_exceptions() > impl_->exceptions) {
    abandon();
    return;
  }
  try {
    wait();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dattn: a dropped message failed: %s\n", error.what());
    if (!impl_) return;
    if (impl_->cancel()) {
      impl_.reset();
      return;
    }
    // Its bytes are about to die while MPI may still read or write them.
    MPI_Abort(MPI_COMM_WORLD, 1);
    std::terminate();
  }
}

}  // namespace dattn::comm
