#include "parallel/stats.hpp"

#include "kernels/attend_backward.hpp"
#include "kernels/check.hpp"

namespace dattn {

template <class E>
void fill_stats(View<const SumOf<E>> o, std::span<const SumOf<E>> lse, View<const E> d_o,
                View<SumOf<E>> stats, int threads) {
  CHECK(stats.dim == 2 && stats.rows == o.rows && stats.heads == o.heads, stats.rows, stats.heads);
  CHECK(static_cast<Index>(lse.size()) == o.rows * o.heads, lse.size());
  View<SumOf<E>> delta = stats;
  ++delta.data;
  delta_of(o, d_o, delta, threads);
  for (Index row = 0; row < o.rows; ++row) {
    for (Index h = 0; h < o.heads; ++h) {
      *stats.at(row, h) = lse[static_cast<std::size_t>(row * o.heads + h)];
    }
  }
}

template void fill_stats<BFloat16>(View<const float>, std::span<const float>, View<const BFloat16>,
                                   View<float>, int);
template void fill_stats<float>(View<const float>, std::span<const float>, View<const float>,
                                View<float>, int);
template void fill_stats<double>(View<const double>, std::span<const double>, View<const double>,
                                 View<double>, int);

}  // namespace dattn
