#pragma once

#include <array>
#include <vector>

#include "parallel/passes.hpp"

namespace dattn {

/// What a rank's memory is for.
enum class Use {
  inputs,       ///< slots that are filled before a run, or a KV cache
  homes,        ///< all other slots
  staging,      ///< messages that travel rounded; what all-reduces over hosts add up
  pseudo_keys,  ///< and the sums that they come of
  kept,         ///< the forward pass's slots and kernels while the backward pass runs
  kernels,      ///< panels and tiles of the threads
  weights,      ///< of a layer of latent attention
  results,      ///< O, LSE and gradients in arrays of their own; dO while Stats are made of it
  check,        ///< the reference and what it is made of
  transport,    ///< what MPI takes once messages flow
  envelopes,    ///< to verify messages, and all-reduces by messages
};
inline constexpr std::size_t kUses = 11;
const char* name_of(Use use);

/// Bytes of one rank by use, at the time when it has most.
struct Needs {
  std::array<Index, kUses> bytes{};

  Index& operator[](Use use) { return bytes[static_cast<std::size_t>(use)]; }
  Index operator[](Use use) const { return bytes[static_cast<std::size_t>(use)]; }
  Index sum() const;
};

/// What takes memory beside the slots of a rank's Programs; each part may be empty.
struct Beside {
  KernelBytes kernels = {};  ///< of a pass
  KernelBytes check = {};    ///< of the check, which follows the passes, from the forward Program
  Index transport = 0;
  Index weights = 0;      ///< of keys (EngineOptions::key_weights)
  bool verifies = false;  ///< messages (EngineOptions::verify_wire)
};

/// Memory that some ranks have together.
struct Budget {
  std::vector<int> ranks;
  Index bytes = 0;
};

/// What a rank needs for its Programs; `backward` may be null. A pass gives its memory back before
/// the next one, unless the Problem keeps: then the forward pass's stays, and what it keeps is not
/// there twice. Of O and LSE the records of a Partial are counted, a number each too many.
Needs needs_of(const Problem& problem, const Program& forward, const Program* backward,
               const Beside& beside = {});

/// Of each rank. @pre the passes are of this problem
std::vector<Needs> needs_of(const Problem& problem, const std::vector<Planned>& passes,
                            const Beside& beside = {});

}  // namespace dattn
