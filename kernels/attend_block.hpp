#pragma once

// What attend() cuts a block into comes here: the folder's own, not for others to include.

#include "kernels/attend.hpp"

namespace dattn {

/// Query lanes that go through the keys together: a tile of keys is fetched once for all of them.
inline constexpr Index kLanes = 128;

/// attend() of keys as they lie, by panels or, where lanes are few, by decode.
/// @pre there are queries and keys, checked
template <class T>
void attend_block(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                  const Where& where, const Mask& mask, const Work& work);

}  // namespace dattn
