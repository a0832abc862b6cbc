#pragma once

#include "kernels/attend.hpp"
#include "kernels/live.hpp"
#include "kernels/readers.hpp"

namespace dattn {

/// Lanes (query rows x heads of a group) up to which `attend` reads keys and values as they lie.
constexpr Index kDecodeLanes = 16;

/// attend for few queries: K and V are read once, in the order of memory, and not packed; the keys
/// are split among the threads. Source: Flash-Decoding (Dao et al. 2023).
/// @pre as attend; no group has more than kDecodeLanes lanes
void decode(View<const float> q, View<const float> k, View<const float> v, View<float> out,
            const Where& where, const Mask& mask, const Work& work,
            const std::vector<HeadGroup>& groups);
void decode(View<const BFloat16> q, View<const BFloat16> k, View<const BFloat16> v, View<float> out,
            const Where& where, const Mask& mask, const Work& work,
            const std::vector<HeadGroup>& groups);

/// The same for parts of a block, each by one thread.
/// @pre no part has more than kDecodeLanes lanes in a group; rows of queries are in one part each
void decode_parts(View<const float> q, View<const float> k, View<const float> v, View<float> out,
                  const Where& where, const Mask& mask, const Work& work,
                  const std::vector<HeadGroup>& groups, const std::vector<Part>& parts);
void decode_parts(View<const BFloat16> q, View<const BFloat16> k, View<const BFloat16> v,
                  View<float> out, const Where& where, const Mask& mask, const Work& work,
                  const std::vector<HeadGroup>& groups, const std::vector<Part>& parts);

}  // namespace dattn
