#include "launcher/mask_files.hpp"

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
            for (const Index extent : file->header().shape)
              sum_.add(static_cast<std::uint64_t>(extent));
            for (const Index number : numbers) sum_.add(static_cast<std::uint64_t>(number));
            return numbers;
          }};
}

std::string MaskFiles::sum() const { return paths_.empty() ? std::string() : sum_.text(); }

}  // namespace dattn
