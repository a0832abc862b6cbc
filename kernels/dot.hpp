#pragma once

#include <array>

#include "kernels/range.hpp"

namespace dattn {

/// The sum of a[n] * b[n], in double: eight sums side by side, since one alone waits for each
/// addition.
template <class A, class B>
double dot(const A* a, const B* b, Index count) {
  constexpr Index kSums = 8;
  std::array<double, kSums> sums{};
  Index n = 0;
  for (; n + kSums <= count; n += kSums) {
    for (Index i = 0; i < kSums; ++i) {
      sums[static_cast<std::size_t>(i)] +=
          static_cast<double>(a[n + i]) * static_cast<double>(b[n + i]);
    }
  }
  double sum = 0;
  for (; n < count; ++n) sum += static_cast<double>(a[n]) * static_cast<double>(b[n]);
  for (const double s : sums) sum += s;
  return sum;
}

}  // namespace dattn
