#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// Neighbourhoods on a grid of one, two or three dimensions.
MaskKind neighbor_kind();
}  // namespace dattn
