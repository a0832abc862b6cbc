#pragma once

#include <span>
#include <vector>

#include "parallel/engine.hpp"
#include "parallel/homes.hpp"
#include "parallel/problem.hpp"

namespace dattn {

/// What an engine does to sums in slots beside kernels: number by number, shared by its threads,
/// whose number changes no bit.
class SlotSums {
 public:
  /// `problem` and `homes` must outlive this; of the options it has threads and checked.
  SlotSums(const Problem& problem, const Program& program, Homes& homes,
           const EngineOptions& options);

  /// Makes a sum one over no pair.
  void start_over(SlotId slot);
  /// Adds gradients to those of the same rows and heads.
  void add(SlotId from, SlotId into);
  /// Merges Partials into those of the same rows and heads.
  void merge(SlotId from, SlotId into);
  /// Merges attention sinks, one a query head of the whole problem, into the Partials that a rank
  /// delivers.
  void add_sinks(const Result& result, std::span<const float> sinks);

 private:
  template <class E, class F>
  void each_part(SlotId from, SlotId into, const F& f);
  template <class F>
  void as_typed(const F& f) const;

  const Problem& problem_;
  Homes& homes_;
  int threads_;
  bool checked_;
  std::vector<bool> reduced_;  ///< by slot: ranks compare what a Reduce has made of it
};

}  // namespace dattn
