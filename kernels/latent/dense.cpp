#include "kernels/latent/dense.hpp"

#include <cblas.h>

#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "kernels/check.hpp"

extern "C" {
/// LAPACK: eigenvalues, ascending, and eigenvectors of a symmetric matrix, by divide and conquer.
void dsyevd_(const char* jobz, const char* uplo, const int* n, double* a, const int* lda, double* w,
             double* work, const int* lwork, int* iwork, const int* liwork, int* info,
             std::size_t jobz_length, std::size_t uplo_length);
}

namespace dattn {

std::vector<double> times(const std::vector<double>& a, const std::vector<double>& b, Index rows,
                          Index inner, Index columns) {
  CHECK(std::ssize(a) == rows * inner && std::ssize(b) == inner * columns, a.size(), b.size());
  std::vector<double> c(static_cast<std::size_t>(rows * columns));
  if (c.empty() || inner == 0) return c;
  const auto wide = static_cast<int>(columns);
  cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, static_cast<int>(rows), wide,
              static_cast<int>(inner), 1, a.data(), static_cast<int>(inner), b.data(), wide, 0,
              c.data(), wide);
  return c;
}

std::vector<double> gram(const std::vector<double>& a, Index rows, Index columns) {
  CHECK(std::ssize(a) == rows * columns, a.size(), rows, columns);
  const auto n = static_cast<std::size_t>(columns);
  std::vector<double> c(n * n);
  if (c.empty() || rows == 0) return c;
  const auto order = static_cast<int>(columns);
  cblas_dsyrk(CblasRowMajor, CblasLower, CblasTrans, order, static_cast<int>(rows), 1, a.data(),
              order, 0, c.data(), order);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < i; ++j) c[j * n + i] = c[i * n + j];
  }
  return c;
}

std::vector<double> eigenvectors(std::vector<double> a, Index order) {
  CHECK(std::ssize(a) == order * order && order >= 1, a.size(), order);
  if (order > most_eigenvectors) {
    throw std::invalid_argument("eigenvectors of a matrix of " + std::to_string(order) +
                                " rows; want at most " + std::to_string(most_eigenvectors));
  }
  // Row-major and lower is Fortran's upper; an eigenvector comes back as a row of `a`.
  const auto n = static_cast<std::size_t>(order);
  const auto rows = static_cast<int>(order);
  const auto length = static_cast<int>(1 + 6 * order + 2 * order * order);
  const auto integers = static_cast<int>(3 + 5 * order);
  std::vector<double> values(n);
  std::vector<double> memory(static_cast<std::size_t>(length));
  std::vector<int> integer_memory(static_cast<std::size_t>(integers));
  int info = 0;
  dsyevd_("V", "U", &rows, a.data(), &rows, values.data(), memory.data(), &length,
          integer_memory.data(), &integers, &info, 1, 1);
  CHECK(info == 0, info);
  std::vector<double> u(n * n);
  for (std::size_t column = 0; column < n; ++column) {
    const double* vector = a.data() + (n - 1 - column) * n;
    double top = 0;
    for (std::size_t i = 0; i < n; ++i) {
      if (std::abs(vector[i]) > std::abs(top)) top = vector[i];
    }
    for (std::size_t i = 0; i < n; ++i) u[i * n + column] = top < 0 ? -vector[i] : vector[i];
  }
  return u;
}

}  // namespace dattn
