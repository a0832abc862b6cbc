#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels/range.hpp"

namespace dattn {

/// A bound on memory, and what this process may still have below it.
struct Limit {
  std::string name;     ///< as the system calls it: "MemAvailable", "RLIMIT_AS", a cgroup's file
  Index left = 0;       ///< bytes
  bool shared = false;  ///< by all processes of the host that name it; else it is a process's own
};

/// All bounds on this process: MemAvailable, the memory cgroups (v1 and v2) that it is in with all
/// their parents, RLIMIT_AS and RLIMIT_DATA. What cannot be read does not bound. Tests
/// give a folder of their own for /proc. Needs no MPI.
std::vector<Limit> memory_limits(const std::string& proc = "/proc");

/// Memory that this process has now; from now on peak_bytes() is the most that it had since. 0: the
/// system does not say.
Index begin_peak();
Index peak_bytes();

/// What one process of this host can have; 0 if nothing says.
Index available_bytes();

/// What is wrong where so many ranks of a host each map a file of `segment` bytes in `folder`, as
/// Open MPI does for messages between them, and how to help; nothing if there is room. Where there
/// is less, Open MPI may do without, end the job, or be ended by SIGBUS once it writes.
std::optional<std::string> shm_note(int ranks_here, Index segment, const std::string& folder);

/// The same of this process and its neighbours, as mpirun's environment tells before MPI is
/// initialised; nothing on any but the first rank of a host, and where shared memory is not used.
std::optional<std::string> shm_note();

}  // namespace dattn
