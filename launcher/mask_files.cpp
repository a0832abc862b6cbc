#include "launcher/mask_files.hpp"

#include <fmt/format.h>

#include <memory>

#include "launcher/npy.hpp"

namespace dattn {

NumberFile MaskFiles::open(const std::string& path) {
  const auto file = std::make_shared<const NpyReader>(path, NpyKind::integers);
  paths_.push_back(path);
  const std::vector<Index>& extents = file->header().shape;
  return {extents, [this, file] {
            std::vector<Index> numbers(static_cast<std::size_t>(file->rows() * file->row_size()));
            file->read_rows<Index>(0, file->rows(), 1, numbers.data());
            for (const Index extent : file->header().shape) add(extent);
            for (const Index number : numbers) add(number);
            return numbers;
          }};
}

std::string MaskFiles::sum() const {
  return paths_.empty() ? std::string() : fmt::format("{:016x}", sum_);
}

/// FNV-1a (Fowler, Noll, Vo) over words in place of bytes, high bits brought back down.
void MaskFiles::add(std::int64_t number) {
  sum_ = (sum_ ^ static_cast<std::uint64_t>(number)) * 0x100000001b3;
  sum_ ^= sum_ >> 32;
}

}  // namespace dattn
