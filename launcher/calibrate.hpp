#pragma once

#include "comm/communicator.hpp"
#include "kernels/attend.hpp"
#include "parallel/machine.hpp"

namespace dattn {

/// Collective: measures what a Forecast needs to know, all ranks at once as in a run: the rate of
/// the slowest rank's kernel on a block like those of this shape split over the ranks (with
/// `backward` also the backward kernel's), and latency and bandwidth of messages around the ring of
/// ranks. Takes tens of milliseconds, for large shapes up to half a second; the same answer on all
/// ranks.
Machine calibrate(comm::Communicator& world, const Shape& shape, Type type, int threads,
                  bool backward = false);

}  // namespace dattn
