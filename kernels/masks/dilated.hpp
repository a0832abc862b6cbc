#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// Keys in steps of a constant, around the query.
MaskKind dilated_kind();
}  // namespace dattn
