#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// Prefix-LM: causal, and every query also sees the first N keys.
MaskKind prefix_kind();
}  // namespace dattn
