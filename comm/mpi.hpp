#pragma once

// The one public header with mpi.h, for programs that use MPI themselves.

#include <mpi.h>

#include "comm/communicator.hpp"

namespace dattn::comm {

/// Collective: a Communicator over a duplicate of `comm`, so that our messages never meet the
/// caller's. Precondition: MPI is initialised, at thread level FUNNELED or above.
Communicator adopt(MPI_Comm comm, const Communicator::Options& options = {});

}  // namespace dattn::comm
