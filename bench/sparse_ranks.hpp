#pragma once

#include "bench/sparse.hpp"
#include "comm/communicator.hpp"

namespace dattn {

/// What a rank may do for a row.
struct SparseLimits {
  int repeats = 7;
  double seconds = 0;  ///< no repeat begins later, but for the first; 0: no limit
  Index memory = 0;    ///< bytes that a rank may use; 0: any number
};

/// Collective: a strategy under the cell's mask beside the ring under the dense one, on all ranks;
/// they take turns. Of decode, `strategy` is a form, under a cache that keeps what the mask will
/// see beside one that keeps everything. Complete at rank 0. Throws if the messages carry other
/// bytes than the proved plan says.
SparseRow measure_on_ranks(comm::Communicator& world, const Cell& cell, const std::string& strategy,
                           const SparseLimits& limits);

}  // namespace dattn
