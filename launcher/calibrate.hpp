#pragma once

#include "comm/communicator.hpp"
#include "kernels/attend.hpp"
#include "parallel/hosts.hpp"
#include "parallel/machine.hpp"

namespace dattn {

/// Collective: measures what a Forecast needs to know, all ranks at once as in a run: the rate of
/// the slowest rank's kernel on a block like those of this shape split over the ranks (with
/// `backward` also the backward kernel's), and latency and bandwidth of messages, inside hosts and
/// between them. Takes tens of milliseconds, for large shapes up to half a second; the same answer
/// on all ranks.
Machine calibrate(comm::Communicator& world, const Shape& shape, Type type, int threads,
                  bool backward = false, const Hosts& hosts = {});

/// What one instruction set makes of one type: floating-point operations a second of a rank, and
/// bytes of rows a second; 0: not measured, or free.
struct KernelRates {
  double forward = 0;
  double backward = 0;
  double rows = 0;
};

/// Collective: the same of these kernels only, of the slowest rank, on blocks that take some tens
/// of milliseconds. Null: the instruction set in use. `with_rows`: also what rows cost.
KernelRates measure_kernels(comm::Communicator& world, const Shape& shape, Type type, int threads,
                            const Isa* isa, bool with_rows);

}  // namespace dattn
