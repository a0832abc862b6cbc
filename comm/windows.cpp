#include "comm/windows.hpp"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <exception>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

#include "comm/channel.hpp"
#include "comm/error.hpp"
#include "comm/host_memory.hpp"
#include "comm/progress.hpp"
#include "comm/wait.hpp"

namespace dattn::comm {
namespace {

template <class S>
std::vector<S> joined(const std::vector<S>& strips) {
  return cut(strips, 0, total(strips));
}

}  // namespace

struct Windows::Message {
  bool receives = false;
  int rank = 0;
  int peer = 0;
  int tag = 0;
  std::int64_t bytes = 0;
  double deadline = 0;
  int exceptions = 0;        // in flight when this was made
  ConstStrips from{};        // of a send
  Strips into{};             // of a receive
  bool lent = false;         // of a send
  std::int64_t piece = -1;   // of a receive; from 0: it borrows
  bool here = false;         // between ranks of a host, told in a Channel
  bool told = false;         // its entry is written
  std::uint64_t number = 0;  // of its entry
  Memory list{};             // the strips that its entry points to
  bool taken = false;        // of a receive, and of sends of a rank to itself
  bool by_mpi = false;       // `mpi` is, or is going to be, its message
  bool at_mpi = false;       // it is
  comm::Request mpi{};
  std::exception_ptr error{};
  std::optional<ConstStrip> view{};
};

struct Windows::Impl {
  using MessagePtr = std::shared_ptr<Message>;
  /// What waits for another member.
  struct Peer {
    std::deque<MessagePtr> untold;    // sends whose entry finds no room, or, to itself, no receive
    std::deque<MessagePtr> awaiting;  // receives that have not met their send
    std::int64_t lent = 0;            // bytes to it, since the last give_back()
  };

  std::optional<Communicator> own{};  // of a split
  Communicator* ranks = nullptr;
  bool on = false;
  int threads = 1;
  std::vector<int> members{};    // ranks of this host
  std::vector<int> member_of{};  // by rank: which of these it is, or -1
  int self = 0;
  std::optional<HostMemory> memory{};  // where members see each other's
  std::vector<Peer> peers{};           // by member
  std::string trouble{};
  std::uint64_t rounds = 0;
  bool lent = false;  // to others, since the last give_back()
  std::int64_t abroad = 0;
  int at_mpi = 0;  // messages
  bool broken = false;

  Front& front(int member) { return *reinterpret_cast<Front*>(memory->front(member)); }
  bool is_here(int peer) const {
    const int member = member_of[static_cast<std::size_t>(peer)];
    return member >= 0 && (memory ? on : on && member == self);
  }
  int member(const Message& m) const { return member_of[static_cast<std::size_t>(m.peer)]; }

  MessagePtr make(bool receives, int peer, int tag, std::int64_t bytes);
  MessagePtr start_send(const ConstStrips& strips, int peer, int tag, bool lends);
  MessagePtr start_recv(const Strips& strips, int peer, int tag, std::int64_t piece);
  void give_to_mpi(Message& m);
  std::optional<HostMemory::Place> find(const ConstStrips& strips) const;
  void tell(Message& m);
  void take(Message& m, int from);
  void deliver(Message& m, const ConstStrips& from, bool lends);
  bool done(Message& m);
  void progress();
  void forget(const MessagePtr& m) noexcept;
};

Windows::Impl::MessagePtr Windows::Impl::make(bool receives, int peer, int tag,
                                              std::int64_t bytes) {
  if (peer < 0 || peer >= ranks->size()) {
    throw std::invalid_argument(fmt::format("peer {} of {} ranks", peer, ranks->size()));
  }
  auto m = std::make_shared<Message>();
  m->receives = receives;
  m->rank = ranks->rank();
  m->peer = peer;
  m->tag = tag;
  m->bytes = bytes;
  m->deadline = ranks->options().deadline;
  m->exceptions = std::uncaught_exceptions();
  m->here = tag == 0 && is_here(peer);
  return m;
}

Windows::Impl::MessagePtr Windows::Impl::start_send(const ConstStrips& strips, int peer, int tag,
                                                    bool lends) {
  auto m = make(false, peer, tag, total(strips));
  m->from = joined(strips);
  m->lent = lends;
  if (!m->here) {
    if (tag == 0 && member_of[static_cast<std::size_t>(peer)] < 0) abroad += m->bytes;
    give_to_mpi(*m);
    return m;
  }
  if (member(*m) != self) {
    lent = lent || lends;
    if (lends) peers[static_cast<std::size_t>(member(*m))].lent += m->bytes;
    // The Communicator's messages must be in the order of their entries, whenever these are told.
    if (!m->from.empty() && !find(m->from)) give_to_mpi(*m);
  }
  peers[static_cast<std::size_t>(member(*m))].untold.push_back(m);
  progress();
  return m;
}

Windows::Impl::MessagePtr Windows::Impl::start_recv(const Strips& strips, int peer, int tag,
                                                    std::int64_t piece) {
  auto m = make(true, peer, tag, total(strips));
  m->into = strips;
  m->piece = piece;
  if (!m->here) {
    give_to_mpi(*m);
    return m;
  }
  peers[static_cast<std::size_t>(member(*m))].awaiting.push_back(m);
  progress();
  return m;
}

void Windows::Impl::give_to_mpi(Message& m) {
  m.mpi = m.receives ? ranks->recv(m.into, m.peer, m.tag) : ranks->send(m.from, m.peer, m.tag);
  m.by_mpi = m.at_mpi = true;
  ++at_mpi;
}

/// Where the first of the strips begins, if all of them are in memory of one allocate().
std::optional<HostMemory::Place> Windows::Impl::find(const ConstStrips& strips) const {
  std::optional<HostMemory::Place> first;
  for (const ConstStrip& s : strips) {
    const auto place = memory->find(s.data, (s.count - 1) * s.stride + s.length);
    if (!place || (first && (place->member != first->member || place->begin != first->begin))) {
      return std::nullopt;
    }
    if (!first) first = place;
  }
  return first;
}

/// Writes the message's entry.
void Windows::Impl::tell(Message& m) {
  Channel& channel = front(self).to(member(m));
  m.number = channel.told.load(std::memory_order_relaxed);
  Entry& entry = channel.entries[m.number % kEntries];
  entry = {};
  entry.bytes = m.bytes;
  entry.by_mpi = m.by_mpi;
  entry.lent = m.lent;
  if (!m.by_mpi && !m.from.empty()) {
    const HostMemory::Place first = *find(m.from);
    entry.place = first;
    entry.place.offset = 0;
    entry.count = std::ssize(m.from);
    StripThere* list = entry.strips.data();
    if (entry.count > kStripsHere) {
      m.list = memory->allocate(entry.count * static_cast<std::int64_t>(sizeof(StripThere)));
      entry.list = *memory->find(m.list.get(), 1);
      list = reinterpret_cast<StripThere*>(m.list.get());
    }
    for (const ConstStrip& strip : m.from) {
      *list++ = {first.offset + (strip.data - m.from.front().data), strip.count, strip.length,
                 strip.stride};
    }
  }
  channel.told.store(m.number + 1, std::memory_order_release);
  m.told = true;
}

/// Takes the next message of the channel from member `from` for the receive `m`.
void Windows::Impl::take(Message& m, int from) {
  Channel& channel = front(from).to(self);
  const std::uint64_t number = channel.taken.load(std::memory_order_relaxed);
  const Entry& entry = channel.entries[number % kEntries];
  try {
    if (entry.bytes != m.bytes) throw Mismatch(m.peer, m.rank, m.bytes, entry.bytes);
    if (entry.by_mpi) {
      give_to_mpi(m);
    } else {
      ConstStrips there;
      if (entry.count > 0) {
        const std::byte* base = memory->at(entry.place);
        const auto* list = entry.count > kStripsHere
                               ? reinterpret_cast<const StripThere*>(memory->at(entry.list))
                               : entry.strips.data();
        for (std::int64_t i = 0; i < entry.count; ++i) {
          there.push_back({base + list[i].offset, list[i].count, list[i].length, list[i].stride});
        }
      }
      deliver(m, there, entry.lent);
      std::atomic<std::int64_t>& moved = m.view ? channel.viewed : channel.copied;
      moved.store(moved.load(std::memory_order_relaxed) + m.bytes, std::memory_order_relaxed);
    }
  } catch (...) {
    m.error = std::current_exception();
  }
  m.taken = true;
  channel.taken.store(number + 1, std::memory_order_release);
  if (Progress* progress = ranks->progress()) progress->moved();
}

void Windows::Impl::deliver(Message& m, const ConstStrips& from, bool lends) {
  if (m.piece >= 0 && lends && from.size() == 1 &&
      (from.front().count == 1 || from.front().length == m.piece)) {
    m.view = from.front();
    return;
  }
  copy(from, m.into, threads);
}

/// Moves what can move without waiting for anybody.
void Windows::Impl::progress() {
  if (broken) {
    throw std::runtime_error(
        fmt::format("rank {} has dropped a message in flight; the job must end", ranks->rank()));
  }
  for (std::size_t i = 0; i < peers.size(); ++i) {
    Peer& peer = peers[i];
    const int other = static_cast<int>(i);
    if (other == self) {
      while (!peer.untold.empty() && !peer.awaiting.empty()) {
        Message& sent = *peer.untold.front();
        Message& received = *peer.awaiting.front();
        sent.told = sent.taken = received.taken = true;
        if (sent.bytes == received.bytes) {
          deliver(received, sent.from, sent.lent);
        } else {
          received.error = std::make_exception_ptr(
              Mismatch(sent.rank, received.rank, received.bytes, sent.bytes));
        }
        peer.untold.pop_front();
        peer.awaiting.pop_front();
      }
      continue;
    }
    if (!peer.untold.empty()) {
      const Channel& out = front(self).to(other);
      while (!peer.untold.empty() &&
             out.told.load(std::memory_order_relaxed) - out.taken.load(std::memory_order_acquire) <
                 kEntries) {
        tell(*peer.untold.front());
        peer.untold.pop_front();
      }
    }
    if (!peer.awaiting.empty()) {
      const Channel& in = front(other).to(self);
      while (!peer.awaiting.empty() &&
             in.told.load(std::memory_order_acquire) != in.taken.load(std::memory_order_relaxed)) {
        const MessagePtr m = std::move(peer.awaiting.front());
        peer.awaiting.pop_front();
        take(*m, other);
      }
    }
  }
  if (at_mpi > 0) ranks->poll();
}

bool Windows::Impl::done(Message& m) {
  progress();
  if (m.error) std::rethrow_exception(m.error);
  if (m.here && !(m.receives ? m.taken : m.told)) return false;
  if (m.by_mpi) {
    if (!m.mpi.test()) return false;
    m.at_mpi = false;
    --at_mpi;
    return true;
  }
  if (m.receives || m.taken) return true;
  return member(m) != self &&
         front(self).to(member(m)).taken.load(std::memory_order_acquire) > m.number;
}

/// Nothing of the message is touched any more; the channel is out of step.
void Windows::Impl::forget(const MessagePtr& m) noexcept {
  broken = true;
  if (m->at_mpi) --at_mpi;
  m->at_mpi = false;
  if (!m->here) return;
  Peer& peer = peers[static_cast<std::size_t>(member(*m))];
  std::erase(peer.untold, m);
  std::erase(peer.awaiting, m);
}

Windows::Windows(Communicator& ranks, const Options& options) : impl_(std::make_shared<Impl>()) {
  Impl& me = *impl_;
  me.ranks = &ranks;
  me.on = options.on;
  Communicator host =
      options.host ? ranks.split(*options.host, ranks.rank()) : ranks.split_by_host();
  me.self = host.rank();
  me.member_of.resize(static_cast<std::size_t>(ranks.size()), -1);
  for (const std::string& rank : host.all_gather(std::to_string(ranks.rank()))) {
    me.member_of[static_cast<std::size_t>(std::stoi(rank))] = static_cast<int>(me.members.size());
    me.members.push_back(std::stoi(rank));
  }
  if (options.host) {
    std::vector<int> hosts;
    for (const std::string& number : ranks.all_gather(std::to_string(*options.host))) {
      hosts.push_back(std::stoi(number));
    }
    ranks.pretend_hosts(std::move(hosts));
  }
  me.peers.resize(me.members.size());
  if (!options.on || host.size() == 1) return;
  const auto attempt = [&](const auto& f) {
    try {
      if (me.trouble.empty()) f();
    } catch (const std::exception& e) {
      me.trouble = fmt::format("rank {}: {}", ranks.rank(), e.what());
    }
  };
  attempt([&] {
    rlimit bound{};
    if (::getrlimit(RLIMIT_AS, &bound) == 0 && bound.rlim_cur != RLIM_INFINITY) {
      throw std::runtime_error(
          "RLIMIT_AS bounds the address space, of which windows take others' too");
    }
  });
  attempt([&] { me.memory.emplace(Front::bytes(me.members.size())); });
  const auto names = host.all_gather(me.memory ? me.memory->name() : "none");
  attempt([&] { me.memory->open(names, me.self); });
  // All see each other, or all go through MPI.
  for (const std::string& trouble : host.all_gather(me.trouble)) {
    if (trouble.empty()) continue;
    me.trouble = trouble;
    me.memory.reset();
    break;
  }
}

Windows::Windows(std::shared_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Windows::Windows(Windows&&) noexcept = default;
Windows& Windows::operator=(Windows&&) noexcept = default;
Windows::~Windows() = default;

int Windows::rank() const { return impl_->ranks->rank(); }
int Windows::size() const { return impl_->ranks->size(); }
bool Windows::shares(int peer) const {
  return impl_->memory && peer != rank() && impl_->is_here(peer);
}
const std::string& Windows::trouble() const { return impl_->trouble; }

Memory Windows::allocate(std::int64_t bytes) {
  try {
    if (impl_->memory) return impl_->memory->allocate(bytes);
  } catch (const std::system_error&) {  // a limit that holds for windows only: MPI takes its place
  }
  return comm::allocate(bytes);
}

Windows::Request Windows::send(const ConstStrips& strips, int peer, int tag) {
  return {impl_, impl_->start_send(strips, peer, tag, false)};
}
Windows::Request Windows::send(const Strips& strips, int peer, int tag) {
  return send(read_only(strips), peer, tag);
}
Windows::Request Windows::lend(const ConstStrips& strips, int peer) {
  return {impl_, impl_->start_send(strips, peer, 0, true)};
}
Windows::Request Windows::recv(const Strips& strips, int peer, int tag) {
  return {impl_, impl_->start_recv(strips, peer, tag, -1)};
}
Windows::Request Windows::borrow(const Strips& strips, int peer, std::int64_t piece) {
  return {impl_, impl_->start_recv(strips, peer, 0, piece)};
}

void Windows::give_back() {
  Impl& me = *impl_;
  if (!me.memory) return;
  me.front(me.self).rounds.store(++me.rounds, std::memory_order_release);
  if (!std::exchange(me.lent, false)) return;
  for (std::size_t late = 0; late < me.members.size(); ++late) {
    const std::int64_t bytes = std::exchange(me.peers[late].lent, 0);
    const auto there = [&] {
      return me.front(static_cast<int>(late)).rounds.load(std::memory_order_acquire) >= me.rounds;
    };
    if (there()) continue;
    const Waiting waiting(me.ranks->progress(), "return", me.members[late], bytes);
    wait_until(me.ranks->options().deadline, there, [&] {
      return fmt::format("end of rank {}'s use of memory of rank {}", me.members[late], rank());
    });
  }
}

void Windows::copy_with(int threads) { impl_->threads = threads; }

Windows::Moved Windows::moved() const {
  Impl& me = *impl_;
  Moved all;
  all.abroad = me.abroad;
  if (!me.memory) return all;
  for (int m = 0; m < static_cast<int>(me.members.size()); ++m) {
    const Channel& channel = me.front(me.self).to(m);
    all.viewed += channel.viewed.load(std::memory_order_relaxed);
    all.copied += channel.copied.load(std::memory_order_relaxed);
  }
  return all;
}

void Windows::all_reduce(std::span<std::byte> records, std::int64_t record_bytes,
                         const Operation& operation) {
  impl_->ranks->all_reduce(records, record_bytes, operation);
}
void Windows::barrier() { impl_->ranks->barrier(); }
void Windows::poll() { impl_->progress(); }

Windows Windows::split(int color, int key) {
  auto part = std::make_shared<Impl>();
  part->own = impl_->ranks->split(color, key);
  part->ranks = &*part->own;
  part->member_of.resize(static_cast<std::size_t>(part->ranks->size()), -1);
  return Windows(std::move(part));
}

Windows::Request::Request() noexcept = default;
Windows::Request::Request(std::shared_ptr<Impl> impl, std::shared_ptr<Message> message) noexcept
    : impl_(std::move(impl)), message_(std::move(message)) {}
Windows::Request::Request(Request&& other) noexcept = default;
Windows::Request& Windows::Request::operator=(Request&& other) noexcept {
  Request dropped(std::move(other));
  std::swap(impl_, dropped.impl_);
  std::swap(message_, dropped.message_);
  std::swap(view_, dropped.view_);
  return *this;
}

Windows::Request::~Request() {
  if (!message_) return;
  if (std::uncaught_exceptions() <= message_->exceptions) {
    try {
      wait();
      return;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "dattn: a dropped message failed: %s\n", error.what());
    }
  }
  if (message_) abandon();
}

void Windows::Request::abandon() noexcept {
  impl_->forget(message_);
  message_.reset();
}

bool Windows::Request::test() {
  if (!message_) return true;
  try {
    if (!impl_->done(*message_)) return false;
  } catch (...) {
    abandon();
    throw;
  }
  view_ = message_->view;
  message_.reset();
  return true;
}

void Windows::Request::wait() {
  if (!message_ || test()) return;
  const Waiting waiting(impl_->ranks->progress(), message_->receives ? "receive" : "send",
                        message_->peer, message_->bytes);
  wait_until(
      message_->deadline, [this] { return test(); }, [this] { return describe(); });
}

std::string Windows::Request::describe() const {
  if (!message_) return "nothing";
  const Message& m = *message_;
  return fmt::format("{} of {} bytes {} rank {} at rank {}{}", m.receives ? "receive" : "send",
                     m.bytes, m.receives ? "from" : "to", m.peer, m.rank,
                     m.here && !m.by_mpi ? ", in shared memory" : "");
}

}  // namespace dattn::comm
