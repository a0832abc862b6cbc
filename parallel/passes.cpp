#include "parallel/passes.hpp"

#include <algorithm>
#include <string>

namespace dattn {
namespace {

const Block& block_of(const Program& program, SlotId s) {
  return program.slots[static_cast<std::size_t>(s)].block;
}

/// Of a step 0, because an Engine is given its inputs before it starts.
Fault at_start(int rank, std::string what) { return {rank, 0, std::move(what)}; }

std::optional<Fault> hand_over(const Program& forward, const Program& backward) {
  const int rank = forward.rank;
  std::vector<SlotId> unused = forward.kept;
  for (const SlotId s : backward.inputs) {
    const Block& input = block_of(backward, s);
    if (input.empty()) continue;
    if (const auto kept = kept_slot(forward, input)) {
      std::erase(unused, *kept);
      continue;
    }
    // dO is given to whom Q is given; of the Stats a rank has what it delivered O of.
    Block given =
        input.kind == Kind::Stats
            ? forward.result(Kind::O).block
            : block_of(forward, forward.input(input.kind == Kind::dO ? Kind::Q : input.kind));
    given.kind = input.kind;
    if (!contains(given, input)) {
      return at_start(rank, "starts with " + text(input) +
                                ", which the forward pass neither kept nor was given: it had " +
                                text(given));
    }
  }
  for (const SlotId s : unused) {
    const Block& kept = block_of(forward, s);
    if (!kept.empty()) {
      return at_start(rank, "does not start with " + text(kept) + ", which the forward pass kept");
    }
  }
  return {};
}

}  // namespace

std::optional<Fault> hand_over(const Plan& forward, const Plan& backward) {
  for (std::size_t r = 0; r < forward.size(); ++r) {
    if (auto fault = hand_over(forward[r], backward[r])) return fault;
  }
  return {};
}

std::optional<SlotId> kept_slot(const Program& forward, const Block& input) {
  const auto found = std::find_if(forward.kept.begin(), forward.kept.end(),
                                  [&](SlotId s) { return block_of(forward, s) == input; });
  if (found == forward.kept.end()) return {};
  return *found;
}

std::vector<Planned> plan_passes(const Strategy& strategy, const Problem& problem,
                                 std::span<const Pass> passes, const Machine& machine) {
  std::vector<Planned> all;
  for (const Pass pass : passes) {
    Plan plan = make_plan(strategy, problem, pass);
    Rehearsal rehearsal = rehearse(problem, plan, machine);
    all.push_back({std::move(plan), std::move(rehearsal)});
  }
  if (all.size() == 2 && !all[0].rehearsal.fault && !all[1].rehearsal.fault) {
    all[1].rehearsal.fault = hand_over(all[0].plan, all[1].plan);
  }
  return all;
}

Index engine_bytes(const Problem& problem, const Program& forward, const Program* backward,
                   const KernelBytes& kernels) {
  const auto engine = [&](const Program& program) {
    return memory_bytes(program, problem) + (kernels ? kernels(problem, program) : 0);
  };
  const Index first = engine(forward);
  if (backward == nullptr) return first;
  const Index stays = problem.keeps() ? first - kept_bytes(forward, problem) : 0;
  return std::max(first, stays + engine(*backward));
}

std::vector<Index> slot_bytes(const Problem& problem, const std::vector<Planned>& passes) {
  const Plan& forward = passes.front().plan;
  std::vector<Index> all;
  for (std::size_t r = 0; r < forward.size(); ++r) {
    all.push_back(
        engine_bytes(problem, forward[r], passes.size() > 1 ? &passes[1].plan[r] : nullptr));
  }
  return all;
}

}  // namespace dattn
