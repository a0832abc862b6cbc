#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "kernels/isa.hpp"
#include "launcher/report.hpp"
#include "parallel/planner.hpp"

namespace dattn {

/// The kernel in use for float or bfloat16. @pre type != Type::f8
const Kernel& chosen_kernel(Type type);

/// Memory in bytes that the kernels of a rank take beside its slots, at most.
Index kernel_bytes(const Problem& problem, const Program& program, int threads);

/// What MPI takes of a rank once messages flow, in bytes: measured, see README.
Index transport_bytes(int ranks);

/// A Budget of a job and who set it.
struct Room {
  std::string name;     ///< of the limit, e.g. "MemAvailable"
  std::string host;     ///< whose it is
  bool shared = false;  ///< by the ranks of the host; else it is one process's own
  Budget budget;
};

/// What bounds the ranks of a job: each limit of a host with all ranks of the host that are under
/// it, and each process's own.
std::vector<Room> rooms_of(const std::vector<RankReport>& ranks);
std::vector<Budget> budgets_of(const std::vector<Room>& rooms);

/// Bytes that each rank may use where all are to use the same: the least share in the Rooms. 0:
/// unknown.
Index bytes_a_rank(const std::vector<RankReport>& ranks);

/// What each rank needs and for what, and what each Room and --memory (`memory`; 0: not given) has,
/// where a job does not fit: lines that begin with '#'.
std::string memory_table(const std::vector<Needs>& needs, const std::vector<Room>& rooms,
                         Index memory);
/// The same with all ranks and all rooms.
nlohmann::json memory_json(const std::vector<Needs>& needs, const std::vector<Room>& rooms,
                           Index memory);

/// Whether each rank has no more than `memory` (0: any number) and each Room holds its ranks.
bool fits(const std::vector<Needs>& needs, const std::vector<Room>& rooms, Index memory);

}  // namespace dattn
