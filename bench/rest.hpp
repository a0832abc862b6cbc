#pragma once

#include <boost/program_options/variables_map.hpp>
#include <vector>

#include "comm/communicator.hpp"

namespace dattn {

/// Collective: a barrier whose waiting ranks sleep, where MPI's own would spin and take cores, heat
/// and memory bandwidth from those that still work. Has no deadline; coarse, so not for timing:
/// follow it with barrier() where ranks must start together.
void rest_until_all(comm::Communicator& ranks);

/// What the option `ranks`, a comma list of numbers of ranks, says of a job of `all`; all of them
/// where it is not given. Throws Failure(usage).
std::vector<int> ranks_listed(const boost::program_options::variables_map& values, int all);

/// Collective: body(some) for each of `counts`, on the first so many ranks; the others rest.
template <class Body>
void on_first_ranks(comm::Communicator& world, const std::vector<int>& counts, const Body& body) {
  for (const int count : counts) {
    const bool works = world.rank() < count;
    comm::Communicator some = world.split(works ? 0 : 1, world.rank());
    if (works) body(some);
    rest_until_all(world);
  }
}

}  // namespace dattn
