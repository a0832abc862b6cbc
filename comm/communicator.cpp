#include "comm/communicator.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <exception>
#include <limits>
#include <stdexcept>
#include <utility>

#include "comm/error.hpp"
#include "comm/handles.hpp"
#include "comm/mpi.hpp"

namespace dattn::comm {
namespace {

constexpr int kMaxTag = 32767;  // the least that MPI promises
constexpr std::int64_t kFront = sizeof(std::int64_t);

void start(const Strips& piece, std::int64_t bytes, const Request::Impl& message, bool synchronous,
           MPI_Comm comm, MPI_Request* request) {
  const bool contiguous = piece.empty() || (piece.size() == 1 && piece.front().count == 1);
  void* data = MPI_BOTTOM;
  int count = 1;
  MPI_Datatype type = MPI_BYTE;
  std::unique_ptr<Datatype> strided;
  if (contiguous) {
    data = piece.empty() ? nullptr : piece.front().data;
    count = to_int(bytes, "message piece");
  } else {
    strided = std::make_unique<Datatype>(piece);
    type = strided->get();
  }
  int code = MPI_SUCCESS;
  if (message.receives) {
    code = MPI_Irecv(data, count, type, message.peer, message.tag, comm, request);
  } else if (synchronous) {
    code = MPI_Issend(data, count, type, message.peer, message.tag, comm, request);
  } else {
    code = MPI_Isend(data, count, type, message.peer, message.tag, comm, request);
  }
  if (code != MPI_SUCCESS) throw Error(code, message.describe());
}

/// MPI reads and writes through one kind of strip; a send only reads.
Strips writable(const ConstStrips& strips) {
  Strips out;
  out.reserve(strips.size());
  for (const ConstStrip& strip : strips) {
    out.push_back({const_cast<std::byte*>(strip.data), strip.count, strip.length, strip.stride});
  }
  return out;
}

}  // namespace

bool checked_build() {
#ifdef DATTN_CHECKED
  return true;
#else
  return false;
#endif
}

Communicator::Impl::Impl(MPI_Comm comm, const Options& wanted)
    : handle(comm), options(wanted), exceptions(std::uncaught_exceptions()) {
  MPI_Comm_set_errhandler(handle, MPI_ERRORS_RETURN);
  MPI_Comm_rank(handle, &rank);
  MPI_Comm_size(handle, &size);
}

Communicator::Impl::~Impl() {
  // Freeing is collective: while an exception unwinds, the other ranks may never come.
  // Nor may it go while a collective that failed still works on it.
  if (finalized() || broken || std::uncaught_exceptions() > exceptions) return;
  MPI_Comm_free(&handle);
}

Request Communicator::Impl::post(bool receives, const Strips& strips, int peer, int tag) {
  if (peer < 0 || peer >= size) {
    throw std::invalid_argument(fmt::format("peer {} of {} ranks", peer, size));
  }
  if (tag < 0 || tag > kMaxTag) throw std::invalid_argument(fmt::format("tag {}", tag));
  auto made = std::make_unique<Request::Impl>();
  Request::Impl& message = *made;
  Request request(std::move(made));  // cancels the pieces under way if a later one throws
  message.verb = receives ? "receive" : "send";
  message.receives = receives;
  message.rank = rank;
  message.peer = peer;
  message.tag = tag;
  message.bytes = total(strips);
  message.limit = std::min(options.piece, options.message_limit);
  message.deadline = options.deadline;
  message.exceptions = std::uncaught_exceptions();
  message.progress = progress;
  message.length = receives ? -1 : message.bytes;

  const bool whole = message.bytes <= message.limit;
  // To itself always: Open MPI 4.1 cuts a short message that is longer than its posted receive
  // without a word when it goes to the same rank, unless the send is synchronous.
  const bool synchronous = options.synchronous || peer == rank;
  std::int64_t begin = 0;
  do {
    const std::int64_t end = std::min(message.bytes, begin + message.limit);
    Strips piece = cut(strips, begin, end);
    std::int64_t bytes = end - begin;
    if (!whole && begin == 0) {
      auto* front = reinterpret_cast<std::byte*>(&message.length);
      piece.insert(piece.begin(), Strip{front, 1, kFront, kFront});
      bytes += kFront;
    }
    message.pieces.push_back({MPI_REQUEST_NULL, bytes});
    start(piece, bytes, message, synchronous, handle, &message.pieces.back().handle);
    begin = end;
  } while (begin < message.bytes);
  return request;
}

Communicator::Communicator(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Communicator::Communicator(Communicator&&) noexcept = default;
Communicator& Communicator::operator=(Communicator&&) noexcept = default;
Communicator::~Communicator() = default;

int Communicator::rank() const { return impl_->rank; }
int Communicator::size() const { return impl_->size; }
const Communicator::Options& Communicator::options() const { return impl_->options; }
void Communicator::set_deadline(double seconds) { impl_->options.deadline = seconds; }
void Communicator::set_progress(Progress* progress) { impl_->progress = progress; }
Progress* Communicator::progress() const { return impl_->progress; }
void Communicator::phase(const char* name) {
  if (impl_->progress != nullptr) impl_->progress->phase(name);
}

void Communicator::set_options(const Options& options) {
  if (options.piece < 1) throw std::invalid_argument(fmt::format("piece {}", options.piece));
  if (options.message_limit < 1 ||
      options.message_limit > std::numeric_limits<int>::max() - kFront) {
    throw std::invalid_argument(fmt::format("message_limit {}", options.message_limit));
  }
  impl_->options = options;
}

Communicator Communicator::split(int color, int key) {
  if (color < 0) throw std::invalid_argument(fmt::format("color {}", color));
  MPI_Comm part = MPI_COMM_NULL;
  {
    const Waiting waiting(impl_->progress, "split", -1, 0, impl_->collectives++);
    check(MPI_Comm_split(impl_->handle, color, key, &part));
  }
  auto made = std::make_unique<Impl>(part, impl_->options);
  made->progress = impl_->progress;
  return Communicator(std::move(made));
}

Communicator Communicator::split_by_host() {
  MPI_Comm part = MPI_COMM_NULL;
  {
    const Waiting waiting(impl_->progress, "split by host", -1, 0, impl_->collectives++);
    check(MPI_Comm_split_type(impl_->handle, MPI_COMM_TYPE_SHARED, rank(), MPI_INFO_NULL, &part));
  }
  auto made = std::make_unique<Impl>(part, impl_->options);
  made->progress = impl_->progress;
  return Communicator(std::move(made));
}

Request Communicator::send(const ConstStrips& strips, int peer, int tag) {
  return impl_->post(false, writable(strips), peer, tag);
}

Request Communicator::send(const Strips& strips, int peer, int tag) {
  return impl_->post(false, strips, peer, tag);
}

Request Communicator::recv(const Strips& strips, int peer, int tag) {
  return impl_->post(true, strips, peer, tag);
}

Request Communicator::send_bytes(std::vector<std::byte> bytes, int peer, int tag) {
  auto kept = std::make_shared<std::vector<std::byte>>(std::move(bytes));
  Request request = impl_->post(false, strips_of(std::span<std::byte>(*kept)), peer, tag);
  request.keep(std::move(kept));
  return request;
}

void Communicator::poll() {
  // Where a message waits for its receive, Open MPI 4.1 only finds that, and moves nothing. Nobody
  // sends to himself here.
  int flag = 0;
  check(MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_SELF, &flag, MPI_STATUS_IGNORE));
}

Communicator adopt(MPI_Comm comm, const Communicator::Options& options) {
  MPI_Comm copy = MPI_COMM_NULL;
  check(MPI_Comm_dup(comm, &copy));
  return Communicator(std::make_unique<Communicator::Impl>(copy, options));
}

std::string library_version() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  check(MPI_Get_library_version(text.data(), &length));
  return text.data();  // Open MPI 4.1 counts the 0 at the end in its length
}

std::string processor_name() {
  std::array<char, MPI_MAX_PROCESSOR_NAME> name{};
  int length = 0;
  check(MPI_Get_processor_name(name.data(), &length));
  return {name.data(), static_cast<std::size_t>(length)};
}

}  // namespace dattn::comm
