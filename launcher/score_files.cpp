#include "launcher/score_files.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "launcher/failure.hpp"
#include "launcher/file_sum.hpp"
#include "launcher/npy.hpp"

namespace dattn {
namespace {

/// Kernel calls copy the bias.
constexpr Index kMostNumbers = Index{1} << 20;

Failure bad_file(const char* option, const std::string& path, const std::string& why) {
  return {Exit::input, fmt::format("{} {}: {}", option, quoted_path(path), why)};
}

/// All numbers of the file, which may be -inf, but neither NaN nor inf.
std::vector<float> numbers_of(const NpyReader& file, const char* option) {
  std::vector<float> numbers(static_cast<std::size_t>(file.rows() * file.row_size()));
  file.read_rows(0, file.rows(), 1, numbers.data());
  const auto bad = std::find_if(numbers.begin(), numbers.end(), [](float x) {
    return !(x < std::numeric_limits<float>::infinity());
  });
  if (bad != numbers.end()) {
    throw bad_file(option, file.path(),
                   fmt::format("number {} is {}; give finite ones, or -inf for pairs that do not "
                               "count",
                               bad - numbers.begin(), *bad));
  }
  return numbers;
}

}  // namespace

void read_relative_bias(const std::string& path, const Shape& shape, Score& score, FileSum& sum) {
  constexpr const char* kOption = "--relative-bias";
  const NpyReader file(path);
  const std::vector<std::int64_t>& extents = file.header().shape;
  const bool of_all = extents.size() == 1;
  const std::int64_t distances = extents.back();
  if (extents.size() > 2 || distances % 2 == 0 || (!of_all && extents[0] != shape.query_heads)) {
    throw bad_file(kOption, path,
                   fmt::format("has shape [{}]; give [{}, 2 * reach + 1] or, for all heads, "
                               "[2 * reach + 1]",
                               fmt::join(extents, ", "), shape.query_heads));
  }
  const Index heads = shape.query_heads;
  if (distances > kMostNumbers / heads) {
    throw bad_file(kOption, path,
                   fmt::format("has {} distances for {} heads; at most {} numbers in all",
                               distances, heads, kMostNumbers));
  }
  sum.add(file);
  const std::vector<float> numbers = numbers_of(file, kOption);
  score.reach = distances / 2;
  for (Index head = 0; head < (of_all ? heads : 1); ++head) {
    score.bias.insert(score.bias.end(), numbers.begin(), numbers.end());
  }
}

KeyWeightsFile::KeyWeightsFile(std::string path, const Shape& shape)
    : path_(std::move(path)), keys_(shape.keys), key_heads_(shape.key_heads) {
  const NpyReader file(path_);
  const std::vector<std::int64_t>& extents = file.header().shape;
  if (extents.size() > 2 || extents[0] != keys_ ||
      (extents.size() == 2 && extents[1] != key_heads_)) {
    throw bad_file("--key-weights", path_,
                   fmt::format("has shape [{}]; give [{}] or [{}, {}]: keys, and key heads",
                               fmt::join(extents, ", "), keys_, keys_, key_heads_));
  }
}

void KeyWeightsFile::add_to(FileSum& sum) const {
  if (named()) sum.add(NpyReader(path_));
}

std::vector<float> KeyWeightsFile::read() const {
  if (!named()) return {};
  const NpyReader file(path_);
  const std::vector<float> numbers = numbers_of(file, "--key-weights");
  if (file.header().shape.size() == 2) return numbers;
  std::vector<float> all;
  all.reserve(static_cast<std::size_t>(keys_ * key_heads_));
  for (const float x : numbers) all.insert(all.end(), static_cast<std::size_t>(key_heads_), x);
  return all;
}

}  // namespace dattn
