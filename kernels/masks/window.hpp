#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// Sliding window: query i sees keys i-L .. i+R.
MaskKind window_kind();
}  // namespace dattn
