#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// A query sees the keys at its own position and before it.
MaskKind causal_kind();
}  // namespace dattn
