#pragma once

#include "parallel/homes.hpp"
#include "parallel/problem.hpp"

namespace dattn {

/// What an engine does to sums in slots beside kernels: number by number, shared by its threads,
/// whose number changes no bit.
class SlotSums {
 public:
  /// Both must outlive this.
  SlotSums(const Problem& problem, Homes& homes, int threads)
      : problem_(problem), homes_(homes), threads_(threads) {}

  /// Makes a sum one over no pair.
  void start_over(SlotId slot);
  /// Adds gradients to those of the same rows and heads.
  void add(SlotId from, SlotId into);
  /// Merges Partials into those of the same rows and heads.
  void merge(SlotId from, SlotId into);

 private:
  template <class E, class F>
  void each_part(SlotId from, SlotId into, const F& f);
  template <class F>
  void as_typed(const F& f) const;

  const Problem& problem_;
  Homes& homes_;
  int threads_;
};

}  // namespace dattn
