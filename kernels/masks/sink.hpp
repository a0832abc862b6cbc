#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// Attention sinks: the first S keys, and no other.
MaskKind sink_kind();
}  // namespace dattn
