#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/mask.hpp"

namespace dattn {

/// Opens the files that a mask names, and remembers what was read: ranks that read other numbers
/// under the same names would compute other masks.
class MaskFiles {
 public:
  /// A NumPy file of integers; Failure(input) if it is none.
  NumberFile open(const std::string& path);

  const std::vector<std::string>& paths() const { return paths_; }
  /// A sum over all that was read so far, in order; empty if no file was opened.
  std::string sum() const;

 private:
  void add(std::int64_t number);

  std::vector<std::string> paths_;
  std::uint64_t sum_ = 0xcbf29ce484222325;
};

}  // namespace dattn
