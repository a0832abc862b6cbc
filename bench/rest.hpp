#pragma once

#include "comm/communicator.hpp"

namespace dattn {

/// Collective: a barrier whose waiting ranks sleep, where MPI's own would spin and take cores, heat
/// and memory bandwidth from those that still work. Has no deadline; coarse, so not for timing:
/// follow it with barrier() where ranks must start together.
void rest_until_all(comm::Communicator& ranks);

}  // namespace dattn
