#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// Every query sees every key.
MaskKind full_kind();
}  // namespace dattn
