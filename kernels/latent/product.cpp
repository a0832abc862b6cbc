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

struct Tile {
  const Product* of;
  Range rows;
  Range columns;
};

std::vector<Tile> tiles_of(std::span<const Product> products) {
  std::vector<Tile> tiles;
  for (const Product& p : products) {
    const Index width = p.rows == 1 ? kColumnsOfOneRow : kColumns;
    for (Index r = 0; r < p.rows; r += kRows) {
      for (Index c = 0; c < p.columns; c += width) {
        tiles.push_back(
            {&p, {r, std::min(r + kRows, p.rows)}, {c, std::min(c + width, p.columns)}});
      }
    }
  }
  return tiles;
}

void compute(const Tile& tile) {
  const Product& p = *tile.of;
  const auto rows = static_cast<int>(tile.rows.size());
  const auto columns = static_cast<int>(tile.columns.size());
  const auto inner = static_cast<int>(p.inner);
  const auto b_stride = static_cast<int>(p.b_stride);
  const float* a = p.a + tile.rows.begin * p.a_stride;
  const float* b = p.b + tile.columns.begin * (p.transposed ? p.b_stride : 1);
  float* c = p.c + tile.rows.begin * p.c_stride + tile.columns.begin;
  const float keep = p.add ? 1.0f : 0.0f;
  if (inner == 0) {  // BLAS leaves c as it is
    for (Index r = 0; r < rows && !p.add; ++r) std::fill_n(c + r * p.c_stride, columns, 0.0f);
    return;
  }
  if (rows == 1) {  // sgemm would pack all of b for it
    cblas_sgemv(CblasRowMajor, p.transposed ? CblasNoTrans : CblasTrans,
                p.transposed ? columns : inner, p.transposed ? inner : columns, 1.0f, b, b_stride,
                a, 1, keep, c, 1);
    return;
  }
  cblas_sgemm(CblasRowMajor, CblasNoTrans, p.transposed ? CblasTrans : CblasNoTrans, rows, columns,
              inner, 1.0f, a, static_cast<int>(p.a_stride), b, b_stride, keep, c,
              static_cast<int>(p.c_stride));
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
  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    const OneThread one;
    Poller poller(work.poll, caught, omp_get_thread_num() == 0);
#pragma omp for schedule(dynamic)
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      const Tile& tile = tiles[i];
      compute(tile);
      poller.after(2.0 * static_cast<double>(tile.rows.size()) *
                   static_cast<double>(tile.columns.size()) * static_cast<double>(tile.of->inner));
    }
  }
  caught.rethrow();
}

}  // namespace dattn
