#pragma once

#include <type_traits>

#include "kernels/range.hpp"

namespace dattn {

/// Numbers somebody else holds, [rows, heads, dim]; a head's numbers are dense.
template <class T>
struct View {
  T* data = nullptr;
  Index rows = 0;
  Index heads = 0;
  Index dim = 0;
  Index stride = 0;  ///< from row to row; 0 where rows are dense

  Index row_stride() const { return stride != 0 ? stride : heads * dim; }
  Index size() const { return rows * heads * dim; }
  bool dense() const { return row_stride() == heads * dim; }
  T* at(Index row, Index head) const { return data + row * row_stride() + head * dim; }
  /// The same rows, heads `local` (counted from 0) only.
  View only(Range local) const {
    return {data + local.begin * dim, rows, local.size(), dim, row_stride()};
  }
  /// The rows `local` only.
  View part(Range local) const {
    return {data + local.begin * row_stride(), local.size(), heads, dim, row_stride()};
  }
  operator View<const T>() const  // NOLINT: reading is always allowed
      requires(!std::is_const_v<T>) {
    return {data, rows, heads, dim, stride};
  }
};

}  // namespace dattn
