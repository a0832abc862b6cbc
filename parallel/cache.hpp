#pragma once

#include <vector>

#include "parallel/problem.hpp"

namespace dattn {

/// How many of its tokens each rank must keep for decoding, by rank and head: those that one of the
/// next queries, behind the last key, may see.
struct CacheNeed {
  std::vector<std::vector<Index>> keys;    ///< [rank][key head]
  std::vector<std::vector<Index>> values;  ///< [rank][value head]
  /// Where the Problem compensates, the pseudo-keys of the tokens that need not be kept: as many
  /// keys of each [rank][key head] (none or one) and values of each [rank][value head] (one for
  /// each key head that shares it). With Compensate::rank at each rank that owns such tokens, with
  /// Compensate::head at the first of these.
  std::vector<std::vector<Index>> pseudo_keys, pseudo_values;

  /// Of a rank's K and V, in bytes; pseudo-keys in the type of sums, a key with its log-weight.
  Index bytes(const Problem& problem, int rank) const;
};

/// @param later how many queries to look ahead. Masks that never see again what they have dropped
/// (causal, window, stream, s2) need one.
CacheNeed cache_need(const Problem& problem, Index later = 4096);

/// The keys of [0, keys) that one of the queries `later` sees with one of `heads`: what a cache of
/// these heads must keep for them.
Ranges keys_kept(const Mask& mask, Range heads, const Run& later, Index keys);

}  // namespace dattn
