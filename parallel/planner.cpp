#include "parallel/planner.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "parallel/pairs.hpp"
#include "parallel/rehearse.hpp"

namespace dattn {
namespace {

/// Up to this many ranks every candidate is rehearsed; beyond, only the best by estimate().
constexpr int kFewRanks = 16;
constexpr std::size_t kFinalists = 2;

Mesh mesh_of(const Strategy& strategy, const std::vector<int>& extents) {
  Mesh mesh;
  std::string_view names = strategy.axes;
  for (const int extent : extents) {
    const std::string_view name = names.substr(0, names.find(','));
    names.remove_prefix(std::min(names.size(), name.size() + 1));
    mesh.axes.push_back(
        {name.empty() ? "axis" + std::to_string(mesh.axes.size()) : std::string(name), extent});
  }
  return mesh;
}

/// Seconds that a few ranks' own programs take if all that can overlap does: a lower bound that
/// needs no rehearsal.
double estimate(const Choice& choice, const Machine& machine) {
  const Problem& problem = *choice.problem;
  PairCounter pairs(problem);
  double slowest = 0;
  for (int i = 0; i < kFewRanks; ++i) {
    const int rank = static_cast<int>(even_part(problem.ranks(), kFewRanks, i).begin);
    const Program program = choice.strategy->program(problem, rank);
    double compute = 0;
    double wire = 0;
    for (const Step& step : program.steps) {
      if (const auto* attend = std::get_if<Attend>(&step)) {
        compute += static_cast<double>(pairs.count(program, *attend)) *
                   problem.shape().flops_per_pair() / machine.rate;
      } else if (const auto* send = std::get_if<Send>(&step)) {
        wire += static_cast<double>(wire_bytes(program, *send, problem)) / machine.bandwidth;
      } else if (const auto* reduce = std::get_if<Reduce>(&step)) {
        const Block& block = program.slots[static_cast<std::size_t>(reduce->slot)].block;
        wire += 2 * static_cast<double>(bytes_of(block, problem.shape(), problem.type())) /
                machine.bandwidth;
      }
    }
    slowest = std::max(slowest, std::max(compute, wire) +
                                    machine.overhead * static_cast<double>(program.steps.size()));
  }
  return slowest;
}

std::vector<Choice> candidates(const Wish& wish, const Shape& shape, const MaskPtr& mask, Type type,
                               std::string& refusals) {
  std::vector<Choice> out;
  for (const Strategy& strategy : strategies()) {
    if (wish.strategy != "auto" && wish.strategy != strategy.name) continue;
    const Mesh mesh = wish.mesh ? mesh_of(strategy, *wish.mesh) : strategy.mesh(wish.ranks, shape);
    if (mesh.ranks() != wish.ranks) {
      refusals = "a mesh of " + mesh.text() + " has " + std::to_string(mesh.ranks()) +
                 " ranks, but there are " + std::to_string(wish.ranks);
      continue;
    }
    for (const PartitionKind& partition : partition_kinds()) {
      if (wish.partition != "auto" && wish.partition != partition.name) continue;
      Choice choice{&strategy,
                    std::make_shared<const Problem>(shape, mask, mesh, partition.name, type)};
      if (const auto refusal = strategy.refuses(*choice.problem)) {
        refusals = std::string(strategy.name) + " " + *refusal;
        break;  // no partition changes what ranks and mesh a strategy takes
      }
      out.push_back(std::move(choice));
    }
  }
  return out;
}

}  // namespace

Choice choose(const Wish& wish, const Shape& shape, const MaskPtr& mask, Type type,
              const Machine& machine) {
  std::string refusals;
  std::vector<Choice> all = candidates(wish, shape, mask, type, refusals);
  if (all.empty()) throw std::invalid_argument(refusals);
  if (all.size() == 1) return all.front();
  if (wish.ranks > kFewRanks) {
    std::vector<std::pair<double, std::size_t>> order;
    for (std::size_t i = 0; i < all.size(); ++i) order.emplace_back(estimate(all[i], machine), i);
    std::sort(order.begin(), order.end());
    order.resize(std::min(order.size(), kFinalists));
    std::vector<Choice> finalists;
    for (const auto& [seconds, i] : order) finalists.push_back(all[i]);
    all = std::move(finalists);
  }
  const Choice* best = nullptr;
  std::pair<double, Index> best_cost;
  for (const Choice& choice : all) {
    const Rehearsal r =
        rehearse(*choice.problem, make_plan(*choice.strategy, *choice.problem), machine);
    if (r.fault) continue;  // whoever runs the choice rehearses it too, and reports
    const std::pair cost{r.forecast_seconds(), r.bytes_sent_total()};
    if (best == nullptr || cost < best_cost) {
      best = &choice;
      best_cost = cost;
    }
  }
  return best == nullptr ? all.front() : *best;
}

}  // namespace dattn
