#pragma once

#include "kernels/attend.hpp"
#include "kernels/workspace.hpp"
#include "launcher/options.hpp"

namespace dattn {

/// All keys and values in one rank's memory, and room for their gradients; in the order of their
/// positions, so that every Ideal of one rank can share them.
template <class E>
struct IdealKeys {
  explicit IdealKeys(const Task& task);

  std::vector<E> k, v, dk, dv;  ///< gradients only if the task wants them
};

/// What a rank would do if messages and plans cost nothing: the query rows that it owns under a
/// partition, against all keys, in one kernel call a pass.
template <class E>
class Ideal {
 public:
  /// `keys` must outlive it. Runs the forward pass once, for what the backward pass needs.
  Ideal(const Task& task, const Problem& problem, int rank, int threads, IdealKeys<E>& keys);

  /// Seconds in the kernel; clearing and finishing do not count.
  double run(Pass pass);

  /// Allowed (head, query, key) triples of its rows.
  Index area() const { return area_; }

 private:
  View<E> view(std::vector<E>& numbers, Index dim) const {
    return {numbers.data(), rows_, shape_.query_heads, dim};
  }

  Shape shape_;
  MaskPtr mask_;
  Index rows_;
  Index area_;
  Where where_;
  Workspace workspace_;
  Work work_;
  IdealKeys<E>& keys_;
  std::vector<E> q_, records_, d_o_, stats_, dq_;
};

/// Bytes of IdealKeys, and of one Ideal for a rank that owns `rows` queries, with what its kernel
/// needs for itself.
Index ideal_keys_bytes(const Task& task);
Index ideal_bytes(const Task& task, Index rows, int threads);
/// What the kernels of one pass take beside their arguments, at most, for `rows` queries and all
/// keys.
Index ideal_kernel_bytes(const Task& task, Pass pass, Index rows, int threads);

}  // namespace dattn
