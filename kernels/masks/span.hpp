#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// Heads whose span grows with the number of keys.
MaskKind span_kind();
}  // namespace dattn
