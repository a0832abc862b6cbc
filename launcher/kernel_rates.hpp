#pragma once

#include "kernels/attend.hpp"
#include "parallel/machine.hpp"
#include "parallel/plan.hpp"

namespace dattn {

/// A clock; the time that passes, or that of a processor which the calling thread has had.
using Seconds = double (*)();
double wall_seconds();
double processor_seconds();

/// Floating-point operations a second of this rank's kernel on a block like those of `like` split
/// over `ranks`, all of whose pairs count.
double kernel_rate(const Shape& like, int ranks, Type type, Pass pass, int threads,
                   Seconds now = wall_seconds, const Score& score = {});

/// The same of a step of decoding: few queries, and more keys than caches hold, if there are.
double decode_rate(const Shape& like, int ranks, Type type, int threads);

/// The same from a block that takes some tens of milliseconds, whatever the instruction set. Null:
/// the one in use.
double quick_rate(const Shape& like, int ranks, Type type, Pass pass, int threads, const Isa* isa);

/// Bytes a second of query rows with their records, and of key rows, that kernels read, pack and
/// write; 0: they cost nothing that shows beside their pairs.
struct RowRates {
  double rows = 0;
  double packs = 0;
};
/// @pre `rate` is kernel_rate() forward
RowRates row_rates(const Shape& like, int ranks, Type type, int threads, double rate,
                   const Isa* isa = nullptr, Seconds now = wall_seconds, const Score& score = {});

/// How the kernels of an instruction set cut blocks; float64's reference path computes what is
/// allowed.
Grain grain_of(Type type, const Isa* isa = nullptr);

}  // namespace dattn
