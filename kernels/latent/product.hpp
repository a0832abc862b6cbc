#pragma once

#include <span>

#include "kernels/attend.hpp"

namespace dattn {

/// c = a b, or c += a b: a [rows, inner], b [inner, columns] (transposed: [columns, inner]), c
/// [rows, columns], all row-major with so many numbers from row to row.
struct Product {
  const float* a;
  Index a_stride;
  const float* b;
  Index b_stride;
  bool transposed = false;
  float* c;
  Index c_stride;
  Index rows;
  Index columns;
  Index inner;
  bool add = false;
};

/// Computes products whose results do not overlap, in float by OpenBLAS on work.threads threads.
///
/// Results are cut into tiles by the sizes alone, and OpenBLAS takes each on one thread: bits do
/// not depend on the threads. An OpenBLAS with threads of its own (not OpenMP) is told, at the
/// first call, to use one in this process from then on, since both kinds would fight for the cores.
void multiply(std::span<const Product> products, const Work& work);

}  // namespace dattn
