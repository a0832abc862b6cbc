#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// Packed documents: a query sees the keys of its own document.
MaskKind documents_kind();
}  // namespace dattn
