#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// A batch of sequences that share prefixes: each sees its prefixes, and its own keys causally.
MaskKind batch_kind();
}  // namespace dattn
