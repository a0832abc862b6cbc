#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "parallel/needs.hpp"

namespace dattn {

/// What the user wants of a plan; "auto" leaves a choice to the forecast.
struct Wish {
  std::string strategy = "auto";
  std::string partition = "auto";
  std::optional<std::vector<int>> mesh;  ///< extents of the axes; nothing: the strategy's own
  int ranks = 1;
  Hosts hosts;    ///< of the ranks
  Speeds speeds;  ///< likewise
  /// Whether blocks go to a host once and on from rank to rank, where a strategy can do that;
  /// nothing: it does, or, if the strategy is chosen too, if the forecast says that it pays.
  std::optional<bool> relays;
  bool gradients = false;  ///< also the backward pass; what counts is both together
  Wire wire = Wire::exact;
  Compensate compensate = Compensate::off;  ///< not with gradients
  /// Bytes that a rank may use, needs_of() with `beside`; 0: any number.
  Index memory = 0;
  std::vector<Budget> budgets;  ///< what ranks of a host, say, may use together
  Beside beside;
  /// Whether the backward pass starts with what the forward pass redistributed, where a strategy
  /// redistributes; nothing: if that fits into `memory`.
  std::optional<bool> keeps;
  /// How many stages ahead inputs may arrive (Problem::prefetch); nothing: one, or at up to 16
  /// ranks more where the forecast says that it pays and they fit into the memory.
  std::optional<int> prefetch;

  /// Forward, or forward and backward.
  std::vector<Pass> passes() const;
};

/// A strategy and a problem that it does not refuse.
struct Choice {
  const Strategy* strategy = nullptr;
  std::shared_ptr<const Problem> problem;  ///< keeps only what there is to keep
  /// Where memory was limited: what a rank may use (of budgets its share), and what the one that
  /// needs most needs, as planned and if it kept.
  Index may_use = 0;
  Index needs = 0;
  Index needs_to_keep = 0;
};

/// What every strategy that was asked for needs is more than a rank may use.
struct DoesNotFit : std::invalid_argument {
  explicit DoesNotFit(const Choice& least_in);
  Choice least;  ///< the one that needs least
};

/// The strategy, mesh and partition of the wish; among several the one whose forecast on `machine`
/// ends first, then the one that sends least. Same arguments, same choice.
/// What does not fit into the memory is no candidate.
/// Throws std::invalid_argument with the reason when nothing is left, DoesNotFit if for memory.
Choice choose(const Wish& wish, const Shape& shape, const MaskPtr& mask, Type type,
              const Machine& machine);

/// What fits and needs least, if anything does; nothing is forecast or rehearsed. Throws
/// std::invalid_argument where every strategy that was asked for refuses. @pre memory is limited
std::optional<Choice> leanest(const Wish& wish, const Shape& shape, const MaskPtr& mask, Type type);

}  // namespace dattn
