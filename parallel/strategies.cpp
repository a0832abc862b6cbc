#include "parallel/strategies.hpp"

#include <algorithm>
#include <array>
#include <numeric>

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

Mesh side_by_side(Mesh mesh, const Hosts& hosts) {
  if (hosts.size() != mesh.ranks() || mesh.axes.size() < 2) return mesh;
  std::vector<int> all(static_cast<std::size_t>(mesh.ranks()));
  std::iota(all.begin(), all.end(), 0);
  std::vector<int> order = hosts.side_by_side(all);
  if (order != all) mesh.order = std::move(order);
  return mesh;
}

namespace {

/// The largest part into which `whole` divides evenly, `most` at most.
int largest_part(int whole, Index most) {
  int part = 1;
  for (int i = 1; i <= whole; ++i) {
    if (whole % i == 0 && i <= most) part = i;
  }
  return part;
}

}  // namespace

Mesh mesh_across(const Strategy& strategy, const Hosts& hosts, int ranks, const Shape& shape) {
  Mesh mesh = side_by_side(strategy.mesh(ranks, shape), hosts);
  if (hosts.count() == 1 || mesh.axes.size() != 2 || hosts.each() < 2) return mesh;
  int inner = hosts.each();
  if (mesh.axes[1].name == "heads") inner = largest_part(inner, shape.query_heads);
  if (mesh.axes[0].name == "heads") {
    inner = ranks / largest_part(hosts.count(), shape.query_heads);
  }
  mesh.axes[0].size = ranks / inner;
  mesh.axes[1].size = inner;
  return mesh;
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
