#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"

namespace dattn {

/// One pass as it is planned.
struct Planned {
  Plan plan;
  Rehearsal rehearsal;
};

/// The passes of a strategy, planned and rehearsed; what hand_over() finds is the backward pass's
/// Fault. @pre as make_program
std::vector<Planned> plan_passes(const Strategy& strategy, const Problem& problem,
                                 std::span<const Pass> passes, const Machine& machine = {});

/// Proves that every rank's backward Program starts with what the rank then has: Q, K and V that
/// its forward Program kept or was itself given, dO of the queries that this was given, Stats of
/// those that it delivered; and that nothing is kept in vain. @pre neither plan has a Fault itself
std::optional<Fault> hand_over(const Plan& forward, const Plan& backward);

/// The slot of the forward Program that keeps exactly this Block, an input of the backward Program,
/// if there is one.
std::optional<SlotId> kept_slot(const Program& forward, const Block& input);

/// Bytes of memory that the kernels of a Program take beside its slots.
using KernelBytes = std::function<Index(const Problem&, const Program&)>;

/// Bytes of memory that the Engines of a rank take at most; `backward` may be null, `kernels`
/// empty. A pass gives its memory back before the next one, unless the Problem keeps: then the
/// forward pass's stays, and what it keeps is not there twice.
Index engine_bytes(const Problem& problem, const Program& forward, const Program* backward,
                   const KernelBytes& kernels = {});
/// engine_bytes() of each rank, kernels left out: slots alone.
std::vector<Index> slot_bytes(const Problem& problem, const std::vector<Planned>& passes);

}  // namespace dattn
