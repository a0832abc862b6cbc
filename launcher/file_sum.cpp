#include "launcher/file_sum.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "launcher/npy.hpp"

namespace dattn {
namespace {

void add_bytes(FileSum& sum, std::span<const std::byte> bytes) {
  std::uint64_t word = 0;
  while (!bytes.empty()) {
    const std::size_t part = std::min(bytes.size(), sizeof word);
    if (part < sizeof word) word = 0;
    std::memcpy(&word, bytes.data(), part);
    sum.add(word);
    bytes = bytes.subspan(part);
  }
}

}  // namespace

void FileSum::add(const std::string& bytes) {
  add(static_cast<std::uint64_t>(bytes.size()));
  add_bytes(*this, std::as_bytes(std::span(bytes)));
}

void FileSum::add(const NpyReader& file) {
  add(static_cast<std::uint64_t>(file.header().type));
  for (const std::int64_t extent : file.header().shape) add(static_cast<std::uint64_t>(extent));
  const std::int64_t row = file.row_size() * npy_item_bytes(file.header().type);
  if (row == 0) return;
  constexpr std::int64_t kBytes = std::int64_t{4} << 20;
  const std::int64_t at_once = std::max<std::int64_t>(1, kBytes / row);
  std::vector<std::byte> bytes;
  for (std::int64_t first = 0; first < file.rows(); first += at_once) {
    bytes.resize(static_cast<std::size_t>(std::min(at_once, file.rows() - first) * row));
    file.read_row_bytes(first, bytes);
    add_bytes(*this, bytes);
  }
}

std::string FileSum::text() const { return fmt::format("{:016x}", sum_); }

}  // namespace dattn
