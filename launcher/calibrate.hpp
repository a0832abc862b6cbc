#pragma once

#include "comm/communicator.hpp"
#include "kernels/attend.hpp"
#include "parallel/hosts.hpp"
#include "parallel/machine.hpp"
#include "parallel/speeds.hpp"

namespace dattn {

/// Collective: measures what a Forecast needs to know, all ranks at once as in a run: the rate of
/// a kernel on a block like those of this shape split over the ranks (with `backward` also the
/// backward kernel's), and latency and bandwidth of messages, inside hosts and between them. The
/// rate is what the fastest rank would have if all were as fast as `speeds` say and as slow as the
/// one that falls behind most: the slowest rank's, if they are equal. Takes tens of milliseconds,
/// for large shapes up to half a second; the same answer on all ranks.
Machine calibrate(comm::Communicator& world, const Shape& shape, Type type, int threads,
                  bool backward = false, const Hosts& hosts = {}, const Speeds& speeds = {},
                  const Score& score = {});

/// Collective: how fast the ranks' kernels are beside each other on such blocks, all at once,
/// medians of a few rounds in steps of 1/32 of the fastest. Takes a second; the same answer on all
/// ranks, but not on the next call.
Speeds measure_speeds(comm::Communicator& world, const Shape& shape, Type type, int threads);

/// Collective: the same of how fast ranks read keys and values that a step of decoding of this
/// shape has in memory.
Speeds measure_decode_speeds(comm::Communicator& world, const Shape& shape, Type type, int threads);

/// What one instruction set makes of one type: floating-point operations a second of a rank, and
/// bytes of rows a second; 0: not measured, or free.
struct KernelRates {
  double forward = 0;
  double backward = 0;
  double rows = 0;
  double packs = 0;  ///< the same of rows of keys
  Grain grain;
};

/// Collective: the same of these kernels only, of the slowest rank, on blocks that take some tens
/// of milliseconds. Null: the instruction set in use. `with_rows`: also what rows cost.
KernelRates measure_kernels(comm::Communicator& world, const Shape& shape, Type type, int threads,
                            const Isa* isa, bool with_rows);

}  // namespace dattn
