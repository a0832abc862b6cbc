#pragma once

#include <optional>
#include <vector>

#include "kernels/attend.hpp"
#include "kernels/workspace.hpp"
#include "launcher/options.hpp"

namespace dattn {

/// Keys and values in one rank's memory, and room for their gradients, if the task wants them.
template <class E>
struct IdealKeys {
  IdealKeys(const Task& task, const Runs& positions, int threads);

  std::vector<E> k, v;
  std::vector<SumOf<E>> dk, dv;
};

/// What a rank would do if messages and plans cost nothing: the query rows that it owns under a
/// partition, against all keys that they see, in one kernel call a pass.
template <class E>
class Ideal {
 public:
  /// `all` has all keys by position, and must outlive it: the Ideals of a rank share what they can.
  /// Runs the forward pass once, for what the backward pass needs.
  Ideal(const Task& task, const Problem& problem, int rank, int threads, IdealKeys<E>& all);

  Ideal(Ideal&&) = delete;

  /// Seconds in the kernel; clearing and finishing do not count.
  double run(Pass pass);

  /// Allowed (head, query, key) triples of its rows.
  Index area() const { return area_; }

 private:
  template <class T>
  View<T> view(std::vector<T>& numbers, Index dim) const {
    return {numbers.data(), rows_, shape_.query_heads, dim};
  }

  Shape shape_;
  MaskPtr mask_;
  Index rows_;
  Index area_;
  Where where_;
  Workspace workspace_;
  Work work_;
  /// Where the keys that the rows see do not lie side by side, they alone: kernels prepare all keys
  /// they are given, and the others would be work that no strategy has.
  std::optional<IdealKeys<E>> own_;
  View<E> k_, v_;  ///< of the keys they see
  View<SumOf<E>> dk_, dv_;
  std::vector<E> q_, d_o_;
  std::vector<SumOf<E>> records_, stats_, dq_;
};

/// The positions of all keys of the task.
Runs all_keys(const Task& task);
/// Bytes of IdealKeys of so many keys, and of one Ideal with what its kernel needs for itself.
Index ideal_keys_bytes(const Task& task, Index keys);
Index ideal_bytes(const Task& task, const Problem& problem, int rank, int threads);

}  // namespace dattn
