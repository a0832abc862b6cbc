#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "comm/operation.hpp"
#include "comm/progress.hpp"
#include "comm/request.hpp"
#include "comm/strip.hpp"

namespace dattn::comm {

/// Whether this build checks more than it must (CMake option DATTN_CHECKED).
bool checked_build();

/// A group of ranks and a private channel between them. Used by the main thread only. Every wait is
/// bounded by the deadline; errors throw Error, Timeout, Mismatch; a broken precondition throws
/// std::invalid_argument. Methods marked collective are called by all ranks in the same order.
class Communicator {
 public:
  using Request = comm::Request;

  struct Options {
    // Bytes; all ranks must have the same. A longer message from rank to rank goes in pieces, so
    // that it moves both ways at once and at every poll; to another host those after the first only
    // once the receiver asks for them: see README.
    std::int64_t piece = std::int64_t{1} << 18;
    std::int64_t piece_abroad = 60000;  // the same between hosts
    // Bytes; what MPI is given at a time, of collectives too.
    std::int64_t message_limit = std::int64_t{1} << 30;
    bool synchronous = checked_build();  // a send completes only when its receive has started
    double deadline = 300;               // seconds; the longest that a wait may take
  };

  struct Impl;
  explicit Communicator(std::unique_ptr<Impl> impl) noexcept;
  Communicator(Communicator&&) noexcept;
  Communicator& operator=(Communicator&&) noexcept;
  ~Communicator();

  int rank() const;
  int size() const;
  const Options& options() const;
  /// Precondition: 1 <= piece, 1 <= piece_abroad, 1 <= message_limit <= 2^31 - 9.
  void set_options(const Options& options);
  void set_deadline(double seconds);
  /// Where this communicator, and what is split off it, notes what the rank waits for; may be null,
  /// as at first. It outlives them.
  void set_progress(Progress* progress);
  Progress* progress() const;
  /// Notes there that a part of the job begins. `name` is a literal.
  void phase(const char* name);

  /// For tests: from here on, ranks with the same number count as one host for the messages between
  /// them; before, those that share memory do. `hosts` are by rank, and the same on all ranks.
  /// Precondition: no message is in flight, and hosts.size() == size().
  void pretend_hosts(std::vector<int> hosts);

  /// Collective: the communicator of the ranks with the same `color` (>= 0), ordered by `key`, then
  /// by rank; it has the same options. Meanwhile no message to another host moves.
  Communicator split(int color, int key);

  /// Collective: the communicator of the ranks that share this one's memory; else as split().
  Communicator split_by_host();

  /// Starts a message to or from `peer`; it meets the other side's in order of posting, per tag.
  /// The strips' bytes must stay as they are, and this communicator live, until the request is
  /// done. Never blocks. A send to this rank itself is always synchronous.
  /// Precondition: 0 <= peer < size(), 0 <= tag <= 8191.
  Request send(const ConstStrips& strips, int peer, int tag = 0);
  Request send(const Strips& strips, int peer, int tag = 0);
  Request recv(const Strips& strips, int peer, int tag = 0);
  /// Starts a message whose bytes the request owns.
  Request send_bytes(std::vector<std::byte> bytes, int peer, int tag = 0);

  /// Collective: every rank's bytes become the combination of all ranks' records, in rank order
  /// unless the operation is commutative. Precondition: the same sizes on all ranks, and
  /// records.size() is a multiple of record_bytes > 0.
  void all_reduce(std::span<std::byte> records, std::int64_t record_bytes,
                  const Operation& operation);
  /// Collective: as all_reduce over `in`, but rank r gets only the counts[r] records that follow
  /// those of the ranks before it, in `out`, which must not overlap `in`.
  void reduce_scatter(std::span<const std::byte> in, std::span<std::byte> out,
                      std::span<const std::int64_t> counts, std::int64_t record_bytes,
                      const Operation& operation);

  /// Collective, for control, not for data: small and simple.
  void barrier();
  void broadcast(std::span<std::byte> bytes, int root);
  void broadcast(std::string& text, int root);
  /// Every rank's text at `root`, by rank; empty elsewhere.
  std::vector<std::string> gather(std::string_view text, int root = 0);
  std::vector<std::string> all_gather(std::string_view text);
  void all_reduce_sum(std::span<double> values);
  void all_reduce_min(std::span<double> values);
  void all_reduce_max(std::span<double> values);
  void all_reduce_sum(std::span<std::int64_t> values);
  void all_reduce_min(std::span<std::int64_t> values);
  void all_reduce_max(std::span<std::int64_t> values);

  /// Lets messages make progress: large ones move only inside MPI's calls.
  void poll();

 private:
  std::vector<std::string> collect(std::string_view text, int root, bool everywhere);

  std::unique_ptr<Impl> impl_;
};

/// The MPI library's own words on its version.
std::string library_version();

/// The name of the host that this rank runs on.
std::string processor_name();

}  // namespace dattn::comm
