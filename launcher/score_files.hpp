#pragma once

#include <string>
#include <vector>

#include "kernels/score.hpp"
#include "kernels/shape.hpp"

namespace dattn {

class FileSum;

/// Reads a bias by relative distance, [query heads, 2 * reach + 1] or, for all heads, [2 * reach +
/// 1] floats, into `score`, and adds what it read to `sum`. Failure(input) if the file holds
/// anything else.
void read_relative_bias(const std::string& path, const Shape& shape, Score& score, FileSum& sum);

/// Log-weights of keys in a NumPy file: [keys], or [keys, key heads].
class KeyWeightsFile {
 public:
  KeyWeightsFile() = default;
  /// Failure(input) if the file holds anything else. Numbers are looked at by read() only.
  KeyWeightsFile(std::string path, const Shape& shape);

  bool named() const { return !path_.empty(); }
  const std::string& path() const { return path_; }
  /// Bytes of what read() gives.
  Index bytes() const { return keys_ * key_heads_ * static_cast<Index>(sizeof(float)); }
  void add_to(FileSum& sum) const;

  /// [keys, key heads]; empty if no file is named. Failure(input) if a number is none.
  std::vector<float> read() const;

 private:
  std::string path_;
  Index keys_ = 0;
  Index key_heads_ = 0;
};

}  // namespace dattn
