#pragma once

#include "kernels/range.hpp"

namespace dattn {

/// Calls f(part) for Ranges that make up [0, count), each of which is read or written once, `bytes`
/// a member: on so many OpenMP threads, each its part, where that is worth it, else at once. f must
/// not throw.
template <class F>
void in_parts(int threads, Index count, Index bytes, const F& f) {
  constexpr Index kWorthwhile = Index{1} << 20;  // a thread takes 0.1 ms for it, a team 0.01
  if (threads == 1 || count * bytes < kWorthwhile) return f(Range{0, count});
    // Always all threads: a team of another size than the last is made anew.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; ++part) f(even_part(count, threads, part));
}

}  // namespace dattn
