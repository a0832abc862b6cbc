#include "kernels/latent/product.hpp"

#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <vector>

#include "kernels/panel.hpp"

namespace dattn {
namespace {

/// Tiles of a result. A single row meets b once, in the order of memory: wide tiles, whose rows are
/// long runs of it.
constexpr Index kRows = 256;
constexpr Index kColumns = 512;
constexpr Index kColumnsOfOneRow = 2048;
/// A bfloat16 b meets so many rows as it lies; rows of c stay in the caches meanwhile.
constexpr Index kNarrowRows = 16;
constexpr Index kNarrowColumns = 1024;
constexpr Index kPanel = 256;  ///< rows of a bfloat16 b that are widened at a time

struct Tile {
  const Product* of;
  Range rows;
  Range columns;
};

std::vector<Tile> tiles_of(std::span<const Product> products) {
  std::vector<Tile> tiles;
  for (const Product& p : products) {
    const bool few = p.b.narrow && p.rows <= kNarrowRows;
    const Index width = p.rows == 1 ? kColumnsOfOneRow : few ? kNarrowColumns : kColumns;
    for (Index r = 0; r < p.rows; r += kRows) {
      for (Index c = 0; c < p.columns; c += width) {
        tiles.push_back(
            {&p, {r, std::min(r + kRows, p.rows)}, {c, std::min(c + width, p.columns)}});
      }
    }
  }
  return tiles;
}

/// c (+)= a b of some rows and columns, b in float.
void multiply_wide(const Product& p, int rows, int columns, int inner, const float* a,
                   const float* b, Index b_stride, bool transposed, float* c, bool add) {
  const float keep = add ? 1.0f : 0.0f;
  const auto stride = static_cast<int>(b_stride);
  if (rows == 1) {  // sgemm would pack all of b for it
    cblas_sgemv(CblasRowMajor, transposed ? CblasNoTrans : CblasTrans, transposed ? columns : inner,
                transposed ? inner : columns, 1.0f, b, stride, a, 1, keep, c, 1);
    return;
  }
  cblas_sgemm(CblasRowMajor, CblasNoTrans, transposed ? CblasTrans : CblasNoTrans, rows, columns,
              inner, 1.0f, a, static_cast<int>(p.a_stride), b, stride, keep, c,
              static_cast<int>(p.c_stride));
}

/// The same with a bfloat16 b of which `panel` takes some rows at a time, as [inner, columns] or,
/// transposed, [columns, inner].
void multiply_widened(const Product& p, int rows, int columns, const float* a, const BFloat16* b,
                      float* c, std::vector<float>& panel) {
  for (Index first = 0; first < p.inner; first += kPanel) {
    const Index inner = std::min(kPanel, p.inner - first);
    const Index across = p.transposed ? inner : columns;
    const Index down = p.transposed ? columns : inner;
    panel.resize(static_cast<std::size_t>(across * down));
    for (Index i = 0; i < down; ++i) {
      const BFloat16* from = b + (p.transposed ? i * p.b_stride + first : (first + i) * p.b_stride);
      float* to = panel.data() + i * across;
      for (Index j = 0; j < across; ++j) to[j] = static_cast<float>(from[j]);
    }
    multiply_wide(p, rows, columns, static_cast<int>(inner), a + first, panel.data(), across,
                  p.transposed, c, p.add || first > 0);
  }
}

void compute(const Tile& tile, const Kernel& kernel, std::vector<float>& panel) {
  const Product& p = *tile.of;
  const auto rows = static_cast<int>(tile.rows.size());
  const auto columns = static_cast<int>(tile.columns.size());
  const auto inner = static_cast<int>(p.inner);
  const float* a = p.a + tile.rows.begin * p.a_stride;
  const Index skipped = tile.columns.begin * (p.transposed ? p.b_stride : 1);
  float* c = p.c + tile.rows.begin * p.c_stride + tile.columns.begin;
  if (inner == 0) {  // BLAS leaves c as it is
    for (Index r = 0; r < rows && !p.add; ++r) std::fill_n(c + r * p.c_stride, columns, 0.0f);
    return;
  }
  if (!p.b.narrow) {
    multiply_wide(p, rows, columns, inner, a, p.b.wide() + skipped, p.b_stride, p.transposed, c,
                  p.add);
  } else if (rows <= kNarrowRows) {
    const long before = kernel.enter();
    kernel.multiply_narrow({.a = a,
                            .a_stride = p.a_stride,
                            .b = p.b.half() + skipped,
                            .b_stride = p.b_stride,
                            .transposed = p.transposed,
                            .c = c,
                            .c_stride = p.c_stride,
                            .rows = rows,
                            .columns = columns,
                            .inner = inner,
                            .add = p.add});
    kernel.leave(before);
  } else {
    multiply_widened(p, rows, columns, a, p.b.half() + skipped, c, panel);
  }
}

/// OpenBLAS works on the calling thread alone while this lives.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) {
    omp_set_num_threads(1);  // what its OpenMP build goes by
    constexpr int own_threads = 1;
    static const bool told = [] {
      if (openblas_get_parallel() == own_threads) openblas_set_num_threads(1);
      return true;
    }();
    static_cast<void>(told);
  }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;

 private:
  int before_;
};

}  // namespace

void multiply(std::span<const Product> products, const Work& work) {
  for (const Product& p : products) {
    CHECK(p.a_stride >= p.inner && p.c_stride >= p.columns, p.a_stride, p.c_stride);
    CHECK(p.b_stride >= (p.transposed ? p.inner : p.columns), p.b_stride, p.inner, p.columns);
  }
  const std::vector<Tile> tiles = tiles_of(products);
  if (tiles.empty()) return;
  const Kernel& kernel = *(work.isa != nullptr ? *work.isa : chosen_isa()).f4;
  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    const OneThread one;
    std::vector<float> panel;
    Poller poller(work.poll, caught, omp_get_thread_num() == 0);
#pragma omp for schedule(dynamic)
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      const Tile& tile = tiles[i];
      compute(tile, kernel, panel);
      poller.after(2.0 * static_cast<double>(tile.rows.size()) *
                   static_cast<double>(tile.columns.size()) * static_cast<double>(tile.of->inner));
    }
  }
  caught.rethrow();
}

}  // namespace dattn
