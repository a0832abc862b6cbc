#pragma once

#include "kernels/mask.hpp"

namespace dattn {
/// Streaming heads: the first keys and the most recent ones, causal.
MaskKind stream_kind();
/// @param sink the first keys that every query sees
/// @param recent the keys up to the query that it sees besides, its own counted
MaskPtr stream_mask(Index sink, Index recent);
}  // namespace dattn
