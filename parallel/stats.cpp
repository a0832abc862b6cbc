#include "parallel/stats.hpp"

#include "kernels/attend_backward.hpp"
#include "kernels/check.hpp"

namespace dattn {

template <class E>
void fill_stats(View<const E> o, std::span<const E> lse, View<const E> d_o, View<E> stats) {
  CHECK(stats.dim == 2 && stats.rows == o.rows && stats.heads == o.heads, stats.rows, stats.heads);
  CHECK(static_cast<Index>(lse.size()) == o.rows * o.heads, lse.size());
  View<E> delta = stats;
  ++delta.data;
  delta_of(o, d_o, delta);
  for (Index row = 0; row < o.rows; ++row) {
    for (Index h = 0; h < o.heads; ++h) {
      *stats.at(row, h) = lse[static_cast<std::size_t>(row * o.heads + h)];
    }
  }
}

template void fill_stats(View<const float>, std::span<const float>, View<const float>, View<float>);
template void fill_stats(View<const double>, std::span<const double>, View<const double>,
                         View<double>);

}  // namespace dattn
