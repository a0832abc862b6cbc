#pragma once

#include <string>
#include <vector>

#include "bench/rows.hpp"
#include "comm/communicator.hpp"
#include "launcher/options.hpp"

namespace dattn {

/// How every number of ranks is tried.
struct TrialOptions {
  std::vector<std::string> strategies;
  int threads = 1;
  int repeats = 7;
  bool alone = true;   ///< the ideal also of one rank alone
  double seconds = 0;  ///< no repeat begins that would end later, but for the first; 0: no limit
  Index bytes_a_rank = 0;  ///< memory that a rank may use; 0: unknown
};

/// The rows of one number of ranks, without their speedup, and what belongs to all of them.
struct Trial {
  Machine machine;
  Speeds speeds;
  std::vector<Row> rows;
  std::string note;  ///< what had to be left out, or empty
};

/// Collective: plans, measures and compares all strategies on one problem; complete at rank 0.
Trial try_strategies(comm::Communicator& ranks, const Task& task, const TrialOptions& options);

}  // namespace dattn
