#pragma once

#include <optional>
#include <string>

#include "parallel/machine.hpp"
#include "parallel/strategies.hpp"

namespace dattn {

/// What the user wants of a plan; "auto" leaves a choice to the forecast.
struct Wish {
  std::string strategy = "auto";
  std::string partition = "auto";
  std::optional<std::vector<int>> mesh;  ///< extents of the axes; nothing: the strategy's own
  int ranks = 1;
  bool gradients = false;  ///< also the backward pass; what counts is both together
  Wire wire = Wire::exact;

  /// Forward, or forward and backward.
  std::vector<Pass> passes() const;
};

/// A strategy and a problem that it does not refuse.
struct Choice {
  const Strategy* strategy = nullptr;
  std::shared_ptr<const Problem> problem;
};

/// The strategy, mesh and partition of the wish; among several the one whose forecast on `machine`
/// ends first, then the one that sends least. Same arguments, same choice.
/// Throws std::invalid_argument with the reason when nothing fits.
Choice choose(const Wish& wish, const Shape& shape, const MaskPtr& mask, Type type,
              const Machine& machine);

}  // namespace dattn
