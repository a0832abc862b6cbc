#pragma once

#include <string>
#include <vector>

#include "comm/communicator.hpp"
#include "launcher/limits.hpp"

namespace dattn {

/// Where a rank runs.
struct Host {
  std::string name;
  int pid = 0;
  std::string cpus;  ///< those that the rank may use, e.g. "0-3,8"
  int cpu_count = 1;
  std::vector<Limit> limits;  ///< on memory, as far as known
};

/// @pre MPI is initialised
Host this_host();

/// The number in OMP_NUM_THREADS, or 0 if it is unset. Failure(usage) if it is no positive number.
int threads_from_environment();

/// Collective: threads for a rank where nobody says: its cpus, shared with the ranks that have the
/// same. @pre `host` is this rank's
int threads_of(comm::Communicator& world, const Host& host);

}  // namespace dattn
