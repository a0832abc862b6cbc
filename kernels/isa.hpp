#pragma once

#include <span>
#include <string_view>

#include "kernels/isa/tiles.hpp"

namespace dattn {

/// Every instruction set that this machine and this build have, best first; portable is always
/// last.
std::span<const Tiles* const> available_tiles();

/// The one in use: the best, or the one that the environment variable DATTN_ISA names (portable,
/// avx2, avx512). Throws std::invalid_argument when that names none of available_tiles().
const Tiles& chosen_tiles();

}  // namespace dattn
