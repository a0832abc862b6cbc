#pragma once

#include <optional>
#include <string>

#include "kernels/shape.hpp"

namespace dattn {

/// The words of a mask (kernels/mask.hpp) from a JSON file that gives heads masks of their own:
///
///     {"mask": "stream:sink=64,recent=256", "heads": {"0-3,9": "causal"}, "key_heads": {"7":
///     "full"}}
///
/// Keys of `heads` are query heads, of `key_heads` all query heads that read these; `mask` is for
/// the heads that neither names, and may be missing if there are none. Each head has one mask, and
/// a mask is not itself a table of heads. Objects of this form may also stand under the layers that
/// they are for, {"layers": {"0,31": {...}, "1-30": {...}}}; then `layer` picks one.
///
/// @throws Failure(input) with what is wrong in the file, Failure(usage) if `layer` does not fit it
std::string read_head_masks(const std::string& path, std::optional<Index> layer,
                            const Shape& shape);

}  // namespace dattn
