#pragma once

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

/// Bytes that each rank may use where all are to use the same: the least share in the available
/// memory of a host, but for some that MPI and the system want. 0: unknown.
Index bytes_a_rank(const std::vector<RankReport>& ranks);

}  // namespace dattn
