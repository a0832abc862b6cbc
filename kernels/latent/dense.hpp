#pragma once

#include <vector>

#include "kernels/range.hpp"

namespace dattn {

// Row-major matrices in double, by BLAS and LAPACK (OpenBLAS has both).

/// a b [rows, columns]: a [rows, inner], b [inner, columns].
std::vector<double> times(const std::vector<double>& a, const std::vector<double>& b, Index rows,
                          Index inner, Index columns);

/// a^T a [columns, columns]: a [rows, columns].
std::vector<double> gram(const std::vector<double>& a, Index rows, Index columns);

/// The largest matrix whose eigenvectors LAPACK can find: its workspace is counted in ints.
inline constexpr Index most_eigenvectors = 32000;

/// The eigenvectors of a symmetric matrix [n, n] as the columns of [n, n], the largest eigenvalue
/// first, each with its largest component positive. By LAPACK's dsyevd. Throws
/// std::invalid_argument where n exceeds most_eigenvectors.
/// @pre all numbers are finite
std::vector<double> eigenvectors(std::vector<double> symmetric, Index n);

}  // namespace dattn
