// Files of block lists that exist in memory only, for masks in tables of cases.
#pragma once

#include <charconv>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/mask.hpp"

namespace dattn {

/// Whether these lists hold the block: about a third of them, runs of neighbours among them.
inline bool block_listed(Index list, Index query_block, Index key_block) {
  const Index pair = key_block / 2;
  return (3 * query_block + 5 * pair + 2 * list + query_block * pair) % 7 < 2 ||
         (query_block + key_block + list) % 5 == 4;
}

/// The array of a file `rows LxQxK` or `columns LxQxK`: offsets or key blocks of L lists of Q query
/// blocks and K key blocks each; with L = 0 one list, its offsets in one dimension. Of a file
/// `offsets A B C` the numbers A, B, C.
inline NumberFile open_blocks(const std::string& name) {
  if (name.starts_with("offsets ")) {
    std::vector<Index> numbers;
    std::istringstream words(name.substr(8));
    for (Index n = 0; words >> n;) numbers.push_back(n);
    return {{std::ssize(numbers)}, [numbers] { return numbers; }};
  }
  const bool rows = name.starts_with("rows ");
  std::vector<Index> size;
  for (std::size_t at = name.find(' '); at != std::string::npos; at = name.find('x', at + 1)) {
    size.push_back(0);
    std::from_chars(name.data() + at + 1, name.data() + name.size(), size.back());
  }
  if (size.size() != 3) throw std::invalid_argument("there is no file " + name);
  std::vector<Index> numbers;
  for (Index list = 0; list < std::max<Index>(size[0], 1); ++list) {
    Index entries = 0;
    for (Index q = 0; q < size[1]; ++q) {
      if (rows) numbers.push_back(entries);
      for (Index k = 0; k < size[2]; ++k) {
        if (!block_listed(list, q, k)) continue;
        ++entries;
        if (!rows) numbers.push_back(k);
      }
    }
    if (rows) numbers.push_back(entries);
  }
  std::vector<Index> extents{std::ssize(numbers)};
  if (rows && size[0] > 0) extents = {size[0], size[1] + 1};
  return {extents, [numbers] { return numbers; }};
}

/// The words of the mask that these files make for so many keys.
inline std::string block_words(Index query_block, Index key_block, Index lists, Index keys) {
  const auto s = [](Index i) { return std::to_string(i); };
  const std::string size =
      s(lists) + "x" + s((keys - 1) / query_block + 1) + "x" + s((keys - 1) / key_block + 1);
  return "blocks:size=" + s(query_block) + "x" + s(key_block) + ",rows=\"rows " + size +
         "\",columns=\"columns " + size + "\"";
}

}  // namespace dattn
