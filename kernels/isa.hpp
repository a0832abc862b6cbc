#pragma once

#include <span>

#include "kernels/isa/kernel.hpp"

namespace dattn {

/// Every instruction set that this machine and this build have, best first; portable is always
/// last. The first call asks the system for the tile registers where there are some: make it before
/// threads start.
std::span<const Isa* const> available_isas();

/// The one in use: the best, or the one that the environment variable DATTN_ISA names (portable,
/// avx2, avx512, amx). Throws std::invalid_argument when that names none of available_isas().
const Isa& chosen_isa();

}  // namespace dattn
