#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// Blocks near the query, and every so-manyth block behind them, another one for each head.
MaskKind s2_kind();
}  // namespace dattn
