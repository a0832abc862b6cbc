#pragma once

#include <memory>
#include <optional>
#include <string>

#include "kernels/bfloat.hpp"
#include "kernels/shape.hpp"
#include "launcher/npy.hpp"
#include "parallel/block.hpp"
#include "parallel/problem.hpp"

namespace dattn {

/// Where Q, K, V and dO come from: NumPy files [tokens, heads, dim], or a seed. Every rank reads or
/// makes only the rows it asks for.
class Source {
 public:
  /// Opens the files; Failure(input) unless they are float tensors of three dimensions that fit
  /// together.
  static Source files(const std::string& q, const std::string& k, const std::string& v);
  /// Standard normal numbers, the same for every number of ranks: a number depends on the seed, the
  /// tensor and its place alone.
  static Source random(const Shape& shape, std::int64_t seed);

  /// Adds dO from a file; Failure(input) unless it is a float tensor with O's shape.
  void add_d_o(const std::string& d_o);
  /// Adds a dO of standard normal numbers, as random().
  void add_d_o(std::int64_t seed);

  const Shape& shape() const { return shape_; }
  bool from_files() const { return q_ != nullptr; }
  /// Whether some file holds doubles.
  bool wide() const { return wide_; }

  /// From now on numbers are rounded to bfloat16 as they are read, whatever they are read into.
  void round_to_bfloat16() { rounds_ = true; }

  /// Fills `out` with all heads of the rows of Q, K, V or dO at these positions, in their order. T
  /// is float, double or, once numbers are rounded to it, BFloat16. Numbers that are made are made
  /// on so many threads; what they are does not depend on it.
  template <class T>
  void read(Kind kind, const Runs& positions, T* out, int threads = 1) const;

 private:
  template <class T>
  void read_rows(Kind kind, const Runs& positions, T* out) const;
  const std::shared_ptr<const NpyReader>& file(Kind kind) const;

  Shape shape_;
  bool wide_ = false;
  bool rounds_ = false;
  std::uint64_t seed_ = 0;
  std::shared_ptr<const NpyReader> q_, k_, v_, d_o_;
};

}  // namespace dattn
