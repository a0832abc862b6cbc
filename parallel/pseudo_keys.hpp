#pragma once

#include <vector>

#include "parallel/machine.hpp"
#include "parallel/problem.hpp"
#include "parallel/reduction.hpp"

namespace dattn {

/// One pseudo-key: it stands for `count` dropped keys, those of the entry `dropped` of
/// Problem::dropped() that `rank` owns; of all ranks where that is -1.
struct PseudoKey {
  std::size_t dropped = 0;
  int rank = -1;
  Index count = 0;
};

/// The pseudo-keys of a problem, by entry and rank; none that stands for no key, and none where
/// nothing is compensated for.
std::vector<PseudoKey> pseudo_keys(const Problem& problem);

/// How many there are, without a list of them.
Index pseudo_key_count(const Problem& problem);

/// Bytes of the numbers of one pseudo-key, a key and a value: as they are added up, in double; and
/// as they stand in memory and travel, in the type of sums.
Index pseudo_sum_bytes(const Shape& shape);
Index pseudo_key_bytes(const Shape& shape, Type type);

/// How the sums of all entries, a record each, become those of all ranks.
Reduction dropped_reduction(const Problem& problem);

/// What a rank does for the pseudo-keys in a forward run. `head`: one all-reduce of the sums of all
/// entries (dropped_reduction). `rank`: the rank's own pseudo-keys go to every other rank, unless
/// it has none.
struct PseudoKeyCost {
  Index bytes_sent = 0;
  Index messages = 0;          ///< to other ranks, and collectives
  Index memory_bytes = 0;      ///< of sums and of all pseudo-keys
  double wait_seconds = 0;     ///< Forecast: of the exchange, if nothing hides it
  double compute_seconds = 0;  ///< Forecast: of sums, and of attention to the pseudo-keys
};
PseudoKeyCost pseudo_key_cost(const Problem& problem, int rank, const Machine& machine = {});

}  // namespace dattn
