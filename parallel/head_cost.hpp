#pragma once

#include <vector>

#include "kernels/mask.hpp"

namespace dattn {

/// Allowed pairs of each query head.
std::vector<Index> pairs_by_head(const Shape& shape, const Mask& mask);

/// What each query head costs a kernel, in pairs: those that the mask allows; those computed beside
/// them, since rows that share a register are computed for every key that one of them sees, where
/// the mask cuts these apart (from a sample of the rows); and what reading and writing rows takes,
/// which few keys a row do not outweigh.
std::vector<Index> cost_by_head(const Shape& shape, const Mask& mask);

}  // namespace dattn
