#pragma once

#include <span>

#include "kernels/attend.hpp"

namespace dattn {

/// Numbers of a matrix, float32 or bfloat16.
struct Factor {
  const void* data;
  bool narrow;  ///< bfloat16

  Factor(const float* numbers) : data(numbers), narrow(false) {}    // NOLINT: of either
  Factor(const BFloat16* numbers) : data(numbers), narrow(true) {}  // NOLINT
  const float* wide() const { return static_cast<const float*>(data); }
  const BFloat16* half() const { return static_cast<const BFloat16*>(data); }
};

/// c = a b, or c += a b: a [rows, inner], b [inner, columns] (transposed: [columns, inner]), c
/// [rows, columns], all row-major with so many numbers from row to row.
struct Product {
  const float* a;
  Index a_stride;
  Factor b;
  Index b_stride;
  bool transposed = false;
  float* c;
  Index c_stride;
  Index rows;
  Index columns;
  Index inner;
  bool add = false;
};

/// Computes products whose results do not overlap, in float on work.threads threads: by OpenBLAS,
/// of few rows with a bfloat16 b by a kernel of work.isa, which reads b as it lies. For more rows
/// such a b is widened, a panel at a time; a is never rounded.
///
/// Results are cut into tiles by the sizes alone, and OpenBLAS takes each on one thread: bits do
/// not depend on the threads. An OpenBLAS with threads of its own (not OpenMP) is told, at the
/// first call, to use one in this process from then on, since both kinds would fight for the cores.
void multiply(std::span<const Product> products, const Work& work);

}  // namespace dattn
