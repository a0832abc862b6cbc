#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/operation.hpp"
#include "comm/strip.hpp"

namespace dattn::comm {

/// A job of threads instead of processes, for tests: a Transport with no MPI in it. Every rank is
/// one thread, which uses one Endpoint. Errors as in Communicator (Mismatch, Timeout,
/// std::invalid_argument), and std::runtime_error in all ranks after fail().
class Loopback {
 public:
  struct Options {
    std::uint64_t seed = 0;
    int max_delay_polls = 0;  // a message arrives after 0 to this many tests of its two requests
    bool rendezvous = false;  // a send completes with its receive, instead of at once
    double deadline = 60;     // seconds; the longest that a wait may take
  };

  class Request;
  class Endpoint;

  explicit Loopback(int ranks);
  /// Precondition: ranks > 0, max_delay_polls >= 0.
  Loopback(int ranks, const Options& options);
  Loopback(const Loopback&) = delete;
  Loopback& operator=(const Loopback&) = delete;
  ~Loopback();

  Endpoint& at(int rank);

  /// Makes every call and every wait of every rank throw, so that no thread hangs when one has
  /// failed. Only the first reason is kept.
  void fail(const std::string& why);

 private:
  struct Job;
  struct Group;
  struct Transfer;

  std::shared_ptr<Job> job_;
  std::vector<Endpoint> endpoints_;
};

/// A message in flight between two threads, or none. The destructor waits, for the deadline at
/// most; then, or while an exception unwinds, it withdraws the message and fails the job.
class [[nodiscard]] Loopback::Request {
 public:
  Request() noexcept;
  Request(Request&& other) noexcept;
  Request& operator=(Request&& other) noexcept;
  ~Request();

  bool test();
  void wait();
  std::string describe() const;

 private:
  friend class Endpoint;
  Request(std::shared_ptr<Transfer> transfer, bool receives) noexcept;

  std::shared_ptr<Transfer> transfer_;
  bool receives_ = false;
  int exceptions_ = 0;  // in flight when this was made
};

/// One rank's end of a Loopback, or of a part of it.
class Loopback::Endpoint {
 public:
  using Request = Loopback::Request;

  Endpoint(Endpoint&&) noexcept;
  Endpoint& operator=(Endpoint&&) noexcept;
  ~Endpoint();

  int rank() const { return rank_; }
  int size() const;

  Request send(const ConstStrips& strips, int peer, int tag = 0);
  Request send(const Strips& strips, int peer, int tag = 0);
  Request recv(const Strips& strips, int peer, int tag = 0);

  /// Collective: combines in rank order, always.
  void all_reduce(std::span<std::byte> records, std::int64_t record_bytes,
                  const Operation& operation);
  void barrier();
  Endpoint split(int color, int key);
  void poll() {}

 private:
  friend class Loopback;
  Endpoint(std::shared_ptr<Group> group, int rank);

  std::shared_ptr<Group> group_;
  int rank_;
};

}  // namespace dattn::comm
