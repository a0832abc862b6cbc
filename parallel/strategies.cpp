#include "parallel/strategies.hpp"

#include <algorithm>
#include <array>

#include "kernels/check.hpp"
#include "parallel/strategies/double_ring.hpp"
#include "parallel/strategies/gather.hpp"
#include "parallel/strategies/lightseq.hpp"
#include "parallel/strategies/local.hpp"
#include "parallel/strategies/mixed.hpp"
#include "parallel/strategies/ring.hpp"
#include "parallel/strategies/tree.hpp"
#include "parallel/strategies/ulysses.hpp"
#include "parallel/strategies/usp.hpp"

namespace dattn {

std::span<const Strategy> strategies() {
  static const std::array table{local_strategy(),    ring_strategy(),           gather_strategy(),
                                lightseq_strategy(), double_ring_strategy(),    ulysses_strategy(),
                                usp_strategy(),      usp_inner_ring_strategy(), mixed_strategy(),
                                tree_strategy()};
  return table;
}

const Strategy* find_strategy(std::string_view name) {
  const auto table = strategies();
  const auto found =
      std::find_if(table.begin(), table.end(), [&](const Strategy& s) { return s.name == name; });
  return found == table.end() ? nullptr : &*found;
}

Program make_program(const Strategy& strategy, const Problem& problem, int rank, Pass pass) {
  return (pass == Pass::forward ? strategy.program : strategy.backward)(problem, rank);
}

Plan make_plan(const Strategy& strategy, const Problem& problem, Pass pass) {
  Plan plan;
  for (int rank = 0; rank < problem.ranks(); ++rank) {
    plan.push_back(make_program(strategy, problem, rank, pass));
  }
  return plan;
}

std::optional<std::string> refuses_other_than_a_line(const Problem& problem) {
  if (problem.mesh().axes.size() == 1) return std::nullopt;
  return "takes its ranks on one axis: leave --mesh out, not '" + problem.mesh().text() + "'";
}

Mesh line_mesh(int ranks, const Shape&) { return line(ranks); }

}  // namespace dattn
