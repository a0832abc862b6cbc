#pragma once

#include "kernels/mask.hpp"

namespace dattn {

/// Which blocks of keys each block of queries sees, as a block-sparse matrix in CSR.
struct BlockLists {
  Index query_block = 64;  ///< positions of a block
  Index key_block = 64;
  /// [lists, query blocks + 1], offsets into the list's columns; each list's begin with 0. One list
  /// for all heads, or one for each key head or query head. A block of queries is a block of
  /// positions: there are as many as it takes to hold all keys, however few queries there are.
  std::vector<Index> rows;
  /// Key blocks, ascending for each query block; the lists one behind the other.
  std::vector<Index> columns;
  /// The files that they come from, for spec() and complaints; empty if there are none, and then
  /// nobody can parse spec() again.
  std::string rows_file = {};
  std::string columns_file = {};
};

/// Query position q sees key position k if block k / key_block is listed for block q / query_block.
/// Positions that are in no block see nothing.
/// @throws BadMaskNumbers if the lists are not what they should be, naming list and block
MaskPtr blocks_mask(const BlockLists& lists, const Shape& shape);

/// The same from files.
MaskKind blocks_kind();

}  // namespace dattn
