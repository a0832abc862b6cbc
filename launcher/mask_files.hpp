#pragma once

#include <string>
#include <vector>

#include "kernels/mask.hpp"
#include "launcher/file_sum.hpp"

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
  std::vector<std::string> paths_;
  FileSum sum_;
};

}  // namespace dattn
