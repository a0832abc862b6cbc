#include "comm/loopback.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "comm/error.hpp"
#include "comm/wait.hpp"

namespace dattn::comm {

/// What all threads share. One mutex guards everything: nothing here needs to be fast.
struct Loopback::Job {
  Options options{};
  std::mutex mutex{};
  std::string failure{};
  std::int64_t changes = 0;  // that a wait may be for
  std::condition_variable woken{};

  /// All three with the mutex held.
  void fail(const std::string& why) {
    if (failure.empty()) failure = why.empty() ? "no reason given" : why;
    changed();
  }
  void changed() {
    ++changes;
    woken.notify_all();
  }
  void check() const {
    if (!failure.empty()) throw std::runtime_error("loopback job failed: " + failure);
  }
};

/// The k-th message of a channel: made by the side that posts first, found by the other.
struct Loopback::Transfer {
  std::shared_ptr<Job> job;
  int from = 0;
  int to = 0;
  int tag = 0;
  int polls = 0;  // tests that still find the message under way
  bool sent = false;
  bool awaited = false;
  bool staged = false;  // eager: the bytes are in `bytes`, not in `source`
  bool delivered = false;
  ConstStrips source{};
  std::vector<std::byte> bytes{};
  Strips target{};
  std::int64_t sent_bytes = 0;
  std::int64_t awaited_bytes = 0;

  /// With the mutex held: whether the message has arrived, perhaps just now.
  bool arrive() {
    if (delivered) return true;
    if (!sent || !awaited) return false;
    if (polls-- > 0) {
      job->changed();  // a wait goes on testing
      return false;
    }
    if (sent_bytes == awaited_bytes) {
      if (!staged) {
        bytes.resize(static_cast<std::size_t>(sent_bytes));
        pack(source, bytes);
      }
      unpack(bytes, target);
    }
    bytes = {};
    job->changed();
    return delivered = true;
  }
};

struct Loopback::Group {
  enum class Kind { kAllReduce, kBarrier, kSplit };
  /// What one rank brings to a collective.
  struct Entry {
    Kind kind = Kind::kBarrier;
    std::span<std::byte> records{};
    std::int64_t record_bytes = 0;
    int color = 0;
    int key = 0;
  };
  struct Channel {
    std::int64_t posted = 0;
    std::deque<std::shared_ptr<Transfer>> sends{};  // no receive posted yet
    std::deque<std::shared_ptr<Transfer>> recvs{};  // no send posted yet
  };

  Group(std::shared_ptr<Job> shared, int ranks)
      : job(std::move(shared)),
        size(ranks),
        entries(static_cast<std::size_t>(ranks)),
        parts(entries.size()) {}

  std::shared_ptr<Transfer> match(int from, int to, int tag, bool receives);

  /// Waits for all ranks; the last to come calls `act` for all, with the mutex held.
  template <class Act>
  void meet(int rank, const Entry& entry, Act act);

  std::shared_ptr<Job> job;
  int size;
  std::map<std::tuple<int, int, int>, Channel> channels{};
  std::vector<Entry> entries;
  std::vector<std::pair<std::shared_ptr<Group>, int>> parts;  // what split gives each rank
  int arrived = 0;
  std::int64_t generation = 0;
};

namespace {

/// Sleeps until something has changed since the last time, but not past a deadline's check. Threads
/// that yield instead still take their turns, so that the one rank with work to do would get a
/// small part of its core.
template <class Job>
auto doze(Job& job) {
  return [&job, seen = std::int64_t{0}]() mutable {
    std::unique_lock lock(job.mutex);
    job.woken.wait_for(lock, std::chrono::milliseconds(10), [&] { return job.changes != seen; });
    seen = job.changes;
  };
}

/// A delay that depends on the message alone, so that a seed gives the same delays on every run.
int delay(const Loopback::Options& options, int from, int to, int tag, std::int64_t index) {
  std::uint64_t x = options.seed;
  for (const std::int64_t part : {std::int64_t{from}, std::int64_t{to}, std::int64_t{tag}, index}) {
    x += static_cast<std::uint64_t>(part) + 0x9e3779b97f4a7c15U;  // splitmix64
    x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
    x ^= x >> 31U;
  }
  const auto choices = static_cast<std::uint64_t>(options.max_delay_polls) + 1;
  return static_cast<int>(x % choices);
}

}  // namespace

std::shared_ptr<Loopback::Transfer> Loopback::Group::match(int from, int to, int tag,
                                                           bool receives) {
  if (from < 0 || from >= size || to < 0 || to >= size) {
    throw std::invalid_argument(fmt::format("peer {} of {} ranks", receives ? from : to, size));
  }
  job->check();
  Channel& channel = channels[{from, to, tag}];
  auto& waiting = receives ? channel.sends : channel.recvs;
  if (!waiting.empty()) {
    auto transfer = waiting.front();
    waiting.pop_front();
    return transfer;
  }
  auto transfer = std::make_shared<Transfer>();
  transfer->job = job;
  transfer->from = from;
  transfer->to = to;
  transfer->tag = tag;
  transfer->polls = delay(job->options, from, to, tag, channel.posted++);
  (receives ? channel.recvs : channel.sends).push_back(transfer);
  return transfer;
}

template <class Act>
void Loopback::Group::meet(int rank, const Entry& entry, Act act) {
  std::int64_t mine = 0;
  {
    const std::lock_guard lock(job->mutex);
    job->check();
    entries[static_cast<std::size_t>(rank)] = entry;
    mine = generation;
    if (++arrived == size) {
      try {
        for (const Entry& other : entries) {
          if (other.kind != entry.kind || other.records.size() != entry.records.size() ||
              other.record_bytes != entry.record_bytes) {
            throw std::invalid_argument("ranks disagree about a collective");
          }
        }
        act();
      } catch (const std::exception& error) {
        job->fail(error.what());
        throw;
      }
      arrived = 0;
      ++generation;
      job->changed();
      return;
    }
  }
  try {
    wait_until(
        job->options.deadline,
        [&] {
          const std::lock_guard lock(job->mutex);
          if (generation != mine) return true;
          job->check();
          return false;
        },
        [&] {
          return fmt::format("collective of {} bytes at rank {}", entry.records.size(), rank);
        },
        doze(*job));
  } catch (const std::exception& error) {
    // Nobody may write into this rank's records once it has left.
    const std::lock_guard lock(job->mutex);
    job->fail(error.what());
    throw;
  }
}

Loopback::Loopback(int ranks) : Loopback(ranks, Options{}) {}

Loopback::Loopback(int ranks, const Options& options) {
  if (ranks <= 0 || options.max_delay_polls < 0) {
    throw std::invalid_argument(
        fmt::format("loopback of {} ranks, delay {}", ranks, options.max_delay_polls));
  }
  job_ = std::make_shared<Job>();
  job_->options = options;
  auto group = std::make_shared<Group>(job_, ranks);
  for (int r = 0; r < ranks; ++r) endpoints_.push_back(Endpoint(group, r));
}

Loopback::~Loopback() = default;

Loopback::Endpoint& Loopback::at(int rank) { return endpoints_.at(static_cast<std::size_t>(rank)); }

void Loopback::fail(const std::string& why) {
  const std::lock_guard lock(job_->mutex);
  job_->fail(why);
}

Loopback::Request::Request() noexcept = default;
Loopback::Request::Request(std::shared_ptr<Transfer> transfer, bool receives) noexcept
    : transfer_(std::move(transfer)),
      receives_(receives),
      exceptions_(std::uncaught_exceptions()) {}
Loopback::Request::Request(Request&& other) noexcept = default;
Loopback::Request& Loopback::Request::operator=(Request&& other) noexcept {
  Request dropped(std::move(other));
  std::swap(transfer_, dropped.transfer_);
  std::swap(receives_, dropped.receives_);
  std::swap(exceptions_, dropped.exceptions_);
  return *this;
}

Loopback::Request::~Request() {
  if (!transfer_) return;
  std::string why = describe() + ": dropped while an exception unwinds";
  if (std::uncaught_exceptions() <= exceptions_) {
    try {
      wait();
      return;
    } catch (const std::exception& error) {
      why = error.what();
    }
  }
  if (!transfer_) return;
  // A failed job copies no more, so the bytes may die.
  const std::lock_guard lock(transfer_->job->mutex);
  if (!transfer_->delivered && (receives_ || !transfer_->staged)) transfer_->job->fail(why);
}

bool Loopback::Request::test() {
  if (!transfer_) return true;
  {
    const std::lock_guard lock(transfer_->job->mutex);
    transfer_->job->check();
    const bool left = !receives_ && transfer_->staged;
    if (!left && !transfer_->arrive()) return false;
  }
  const auto done = std::exchange(transfer_, nullptr);
  if (receives_ && done->sent_bytes != done->awaited_bytes) {
    throw Mismatch(done->from, done->to, done->awaited_bytes, done->sent_bytes);
  }
  return true;
}

void Loopback::Request::wait() {
  if (!transfer_) return;
  wait_until(
      transfer_->job->options.deadline, [this] { return test(); }, [this] { return describe(); },
      doze(*transfer_->job));
}

std::string Loopback::Request::describe() const {
  if (!transfer_) return "nothing";
  const Transfer& t = *transfer_;
  return receives_ ? fmt::format("receive of {} bytes from rank {} (tag {}) at rank {}",
                                 t.awaited_bytes, t.from, t.tag, t.to)
                   : fmt::format("send of {} bytes to rank {} (tag {}) at rank {}", t.sent_bytes,
                                 t.to, t.tag, t.from);
}

Loopback::Endpoint::Endpoint(std::shared_ptr<Group> group, int rank)
    : group_(std::move(group)), rank_(rank) {}
Loopback::Endpoint::Endpoint(Endpoint&&) noexcept = default;
Loopback::Endpoint& Loopback::Endpoint::operator=(Endpoint&&) noexcept = default;
Loopback::Endpoint::~Endpoint() = default;

int Loopback::Endpoint::size() const { return group_->size; }

Loopback::Request Loopback::Endpoint::send(const ConstStrips& strips, int peer, int tag) {
  const std::int64_t bytes = total(strips);
  const std::lock_guard lock(group_->job->mutex);
  auto transfer = group_->match(rank_, peer, tag, false);
  transfer->sent = true;
  group_->job->changed();
  transfer->sent_bytes = bytes;
  transfer->staged = !group_->job->options.rendezvous;
  if (transfer->staged) {
    transfer->bytes.resize(static_cast<std::size_t>(bytes));
    pack(strips, transfer->bytes);
  } else {
    transfer->source = strips;
  }
  return Request(std::move(transfer), false);
}

Loopback::Request Loopback::Endpoint::send(const Strips& strips, int peer, int tag) {
  return send(read_only(strips), peer, tag);
}

Loopback::Request Loopback::Endpoint::recv(const Strips& strips, int peer, int tag) {
  const std::int64_t bytes = total(strips);
  const std::lock_guard lock(group_->job->mutex);
  auto transfer = group_->match(peer, rank_, tag, true);
  transfer->awaited = true;
  group_->job->changed();
  transfer->awaited_bytes = bytes;
  transfer->target = strips;
  return Request(std::move(transfer), true);
}

void Loopback::Endpoint::all_reduce(std::span<std::byte> records, std::int64_t record_bytes,
                                    const Operation& operation) {
  if (record_bytes <= 0 || std::ssize(records) % record_bytes != 0) {
    throw std::invalid_argument(
        fmt::format("{} bytes for records of {} bytes", records.size(), record_bytes));
  }
  Group::Entry entry{.kind = Group::Kind::kAllReduce};
  entry.records = records;
  entry.record_bytes = record_bytes;
  group_->meet(rank_, entry, [&] {
    const auto& all = group_->entries;
    std::vector<std::byte> sum(all.back().records.begin(), all.back().records.end());
    for (std::size_t r = all.size() - 1; r-- > 0;) {
      operation.combine(all[r].records.data(), sum.data(), std::ssize(sum) / record_bytes,
                        record_bytes);
    }
    for (const Group::Entry& other : all) std::ranges::copy(sum, other.records.begin());
  });
}

void Loopback::Endpoint::barrier() {
  group_->meet(rank_, {.kind = Group::Kind::kBarrier}, [] {});
}

Loopback::Endpoint Loopback::Endpoint::split(int color, int key) {
  if (color < 0) throw std::invalid_argument(fmt::format("color {}", color));
  Group::Entry entry{.kind = Group::Kind::kSplit};
  entry.color = color;
  entry.key = key;
  group_->meet(rank_, entry, [&] {
    std::map<int, std::vector<std::pair<int, int>>> colors;  // of (key, rank)
    for (int r = 0; r < group_->size; ++r) {
      const Group::Entry& other = group_->entries[static_cast<std::size_t>(r)];
      colors[other.color].emplace_back(other.key, r);
    }
    for (auto& [shared, members] : colors) {
      std::ranges::sort(members);
      auto part = std::make_shared<Group>(group_->job, static_cast<int>(members.size()));
      for (int r = 0; r < part->size; ++r) {
        const int before = members[static_cast<std::size_t>(r)].second;
        group_->parts[static_cast<std::size_t>(before)] = {part, r};
      }
    }
  });
  const std::lock_guard lock(group_->job->mutex);
  auto [part, rank] = std::exchange(group_->parts[static_cast<std::size_t>(rank_)], {});
  return {std::move(part), rank};
}

}  // namespace dattn::comm
