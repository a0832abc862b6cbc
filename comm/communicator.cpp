#include "comm/communicator.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <exception>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "comm/error.hpp"
#include "comm/handles.hpp"
#include "comm/mpi.hpp"
#include "comm/outbox.hpp"

namespace dattn::comm {
namespace {

/// By rank, a number that the ranks of a host share.
std::vector<int> hosts_of(MPI_Comm comm, int ranks) {
  MPI_Comm host = MPI_COMM_NULL;
  check(MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host));
  int together = 0;
  int first = 0;
  MPI_Comm_size(host, &together);
  MPI_Comm_rank(comm, &first);
  std::vector<int> hosts(static_cast<std::size_t>(ranks), 0);
  if (together != ranks) {
    check(MPI_Bcast(&first, 1, MPI_INT, 0, host));
    check(MPI_Allgather(&first, 1, MPI_INT, hosts.data(), 1, MPI_INT, comm));
  }
  MPI_Comm_free(&host);
  return hosts;
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

Communicator::Impl::Impl(MPI_Comm comm, const Impl& whole) : Impl(comm, whole.options) {
  progress = whole.progress;
  outbox = whole.outbox;
  std::vector<int> mine(static_cast<std::size_t>(size));
  std::iota(mine.begin(), mine.end(), 0);
  std::vector<int> there(mine.size());
  MPI_Group part = MPI_GROUP_NULL;
  MPI_Group all = MPI_GROUP_NULL;
  check(MPI_Comm_group(handle, &part));
  check(MPI_Comm_group(whole.handle, &all));
  check(MPI_Group_translate_ranks(part, size, mine.data(), all, there.data()));
  MPI_Group_free(&part);
  MPI_Group_free(&all);
  for (const int r : there) hosts.push_back(whole.hosts[static_cast<std::size_t>(r)]);
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
  if (tag < 0 || tag >= kTags) throw std::invalid_argument(fmt::format("tag {}", tag));
  const bool abroad =
      hosts[static_cast<std::size_t>(peer)] != hosts[static_cast<std::size_t>(rank)];
  auto made = std::make_unique<Request::Impl>();
  Request::Impl& message = *made;
  Request request(std::move(made));  // cancels the pieces under way if a later one throws
  message.verb = receives ? "receive" : "send";
  message.receives = receives;
  message.comm = handle;
  // To itself always: Open MPI 4.1 cuts a short message that is longer than its posted receive
  // without a word when it goes to the same rank, unless the send is synchronous.
  message.synchronous = options.synchronous || peer == rank;
  message.rank = rank;
  message.peer = peer;
  message.tag = tag;
  message.bytes = total(strips);
  message.limit = std::min(abroad ? options.piece_abroad : options.piece, options.message_limit);
  message.deadline = options.deadline;
  message.exceptions = std::uncaught_exceptions();
  message.progress = progress;
  message.outbox = outbox;
  message.length = receives ? -1 : message.bytes;
  message.strips = strips;

  const bool whole = message.bytes <= message.limit;
  std::int64_t begin = 0;
  do {
    const std::int64_t end = std::min(message.bytes, begin + message.limit);
    const bool front = !whole && begin == 0;
    message.pieces.push_back({MPI_REQUEST_NULL, end - begin + (front ? kFront : 0)});
    begin = end;
  } while (begin < message.bytes);
  message.asks = abroad && !whole;
  message.start();
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
  if (options.piece_abroad < 1) {
    throw std::invalid_argument(fmt::format("piece_abroad {}", options.piece_abroad));
  }
  if (options.message_limit < 1 ||
      options.message_limit > std::numeric_limits<int>::max() - kFront) {
    throw std::invalid_argument(fmt::format("message_limit {}", options.message_limit));
  }
  impl_->options = options;
}

void Communicator::pretend_hosts(std::vector<int> hosts) {
  if (std::ssize(hosts) != size()) {
    throw std::invalid_argument(fmt::format("hosts of {} of {} ranks", hosts.size(), size()));
  }
  impl_->hosts = std::move(hosts);
}

Communicator Communicator::split(int color, int key) {
  if (color < 0) throw std::invalid_argument(fmt::format("color {}", color));
  MPI_Comm part = MPI_COMM_NULL;
  {
    const Waiting waiting(impl_->progress, "split", -1, 0, impl_->collectives++);
    check(MPI_Comm_split(impl_->handle, color, key, &part));
  }
  return Communicator(std::make_unique<Impl>(part, *impl_));
}

Communicator Communicator::split_by_host() {
  MPI_Comm part = MPI_COMM_NULL;
  {
    const Waiting waiting(impl_->progress, "split by host", -1, 0, impl_->collectives++);
    check(MPI_Comm_split_type(impl_->handle, MPI_COMM_TYPE_SHARED, rank(), MPI_INFO_NULL, &part));
  }
  return Communicator(std::make_unique<Impl>(part, *impl_));
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
  impl_->outbox->advance();
}

Communicator adopt(MPI_Comm comm, const Communicator::Options& options) {
  MPI_Comm copy = MPI_COMM_NULL;
  check(MPI_Comm_dup(comm, &copy));
  auto made = std::make_unique<Communicator::Impl>(copy, options);
  made->outbox = std::make_shared<Outbox>();
  made->hosts = hosts_of(copy, made->size);
  return Communicator(std::move(made));
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
