#pragma once

#include <cstdint>
#include <string>

namespace dattn {

class NpyReader;

/// A sum over what was read from files, in order: ranks that read other things under the same names
/// have other sums. It finds mistakes, not attacks.
class FileSum {
 public:
  /// FNV-1a (Fowler, Noll, Vo) over words in place of bytes, high bits brought back down.
  void add(std::uint64_t word) {
    sum_ = (sum_ ^ word) * 0x100000001b3;
    sum_ ^= sum_ >> 32;
  }
  void add(const std::string& bytes);
  /// Type, shape and every byte of the data. Takes a row of memory, or 4 MiB if that is more.
  void add(const NpyReader& file);

  std::string text() const;

 private:
  std::uint64_t sum_ = 0xcbf29ce484222325;
};

}  // namespace dattn
