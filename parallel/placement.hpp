#pragma once

#include <vector>

#include "kernels/mask.hpp"

namespace dattn {

/// Which query heads each of some ranks computes, all keys of them.
struct Placement {
  std::vector<Ranges> heads;  ///< by member; every query head is somebody's
  bool even = true;           ///< neighbouring heads in parts that differ by one at most
  /// What its heads cost the most loaded member over the mean, as placed and in even parts; of
  /// members that are not equally fast the time of both.
  double most = 1;
  double most_even = 1;
};

/// Even parts of neighbouring heads, as Ulysses has them, unless these leave some member more than
/// heads placed by cost do: longest processing time first (Graham 1969) over what they
/// cost a kernel (head_cost.hpp), of all heads that share a key or value head together if that is
/// near enough, else head by head, whose keys several members then hold. Heads of equal cost go to
/// members in order, so that neighbours stay together. What counts is cost over speed: `speeds` by
/// member, in any unit; none: all are equally fast.
Placement place_heads(const Shape& shape, const Mask& mask, int members,
                      const std::vector<Index>& speeds = {});

/// Heads that see much go to all members together, each some of their queries; heads that see at
/// most a quarter as much go to one member each, whole. Either may be none.
struct HeadSplit {
  Ranges shared;
  std::vector<Ranges> whole;  ///< by member
};

/// What shares a key or value head stays together in `shared` or in `whole`; there it is placed by
/// cost, as place_heads() does.
HeadSplit split_heads(const Shape& shape, const Mask& mask, int members,
                      const std::vector<Index>& speeds = {});

}  // namespace dattn
