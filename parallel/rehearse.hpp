#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "parallel/machine.hpp"
#include "parallel/plan.hpp"

namespace dattn {

/// Why a Plan is wrong: where, and in words that name the pair, the message or the slot.
struct Fault {
  int rank = 0;
  int step = 0;  ///< the number of steps of the rank when its end is meant
  std::string what;

  /// "rank 3, step 7: ..."
  std::string text() const;
};

/// What comes of a Plan: a Fault, or the proof that there is none and what the plan costs.
struct Rehearsal {
  std::optional<Fault> fault;
  std::vector<Index> bytes_sent;    ///< by rank; what stays on the rank does not count
  std::vector<Index> memory_bytes;  ///< by rank; all homes and staging, inputs and result included
  std::vector<Index> kept_bytes;    ///< by rank; of these, what the backward pass starts with
  std::vector<Index> pairs;         ///< by rank; allowed (head, query, key) triples it computes
  std::map<std::pair<int, int>, Index> links;  ///< bytes from a to b, collectives left out
  /// Bytes from host a to host b, a == b: inside it. Collectives are in it, see Reduction.
  std::map<std::pair<int, int>, Index> host_links;
  Index messages = 0;                     ///< between different ranks, and collectives once a rank
  std::vector<std::pair<int, int>> dead;  ///< (rank, step) without effect on the result

  /// The Forecast, by rank: seconds until its end, in kernels and sums, of these in sums (cleared,
  /// added and merged beside kernels), and waiting.
  std::vector<double> seconds;
  std::vector<double> compute_seconds;
  std::vector<double> sum_seconds;
  std::vector<double> wait_seconds;

  Index bytes_sent_total() const;
  /// Of these, what stays on the host of its sender, and what goes to another one.
  Index bytes_inside_hosts() const;
  Index bytes_between_hosts() const;
  Index pairs_total() const;
  double forecast_seconds() const;
};

/// Runs all Programs symbolically, without MPI and without data, every send as a rendezvous: what
/// finishes so finishes under any buffering, because nothing in a Plan depends on who comes first.
/// Proves that all messages match in order and content, that nothing deadlocks, that no slot is
/// read before it is whole or overwritten in flight, that what is kept is whole at the end, that
/// every row of every result is delivered once, and that every allowed (head, query, key) is in it
/// exactly once: in O, or in dQ of its query, in dK of its key and in dV of its value.
Rehearsal rehearse(const Problem& problem, const Plan& plan, const Machine& machine = {});

}  // namespace dattn
