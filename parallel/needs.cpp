#include "parallel/needs.hpp"

#include <algorithm>
#include <numeric>

#include "parallel/pseudo_keys.hpp"
#include "parallel/verifying.hpp"

namespace dattn {
namespace {

Index total(const std::vector<Index>& bytes) {
  return std::accumulate(bytes.begin(), bytes.end(), Index{0});
}

/// What the Engine of a Program takes.
Needs engine_needs(const Problem& problem, const Program& program, const Beside& beside) {
  Needs needs;
  const std::vector<Index> homes = home_bytes(program, problem);
  for (const SlotId s : program.inputs) {
    needs[Use::inputs] +=
        homes[static_cast<std::size_t>(program.slots[static_cast<std::size_t>(s)].home)];
  }
  needs[Use::homes] = total(homes) - needs[Use::inputs];
  needs[Use::staging] = total(staging_bytes(program, problem)) + reduce_bytes(program, problem);
  needs[Use::pseudo_keys] = pseudo_key_cost(problem, program.rank).memory_bytes;
  needs[Use::kernels] = beside.kernels ? beside.kernels(problem, program) : 0;
  needs[Use::envelopes] = beside.verifies ? verifying_bytes(program, problem) : 0;
  return needs;
}

Index result_bytes(const Problem& problem, const Program& program) {
  Index sum = 0;
  for (const Result& result : program.results) {
    sum += bytes_of(result.block, problem.shape(), problem.type());
  }
  return sum;
}

/// dO, from which the Stats are made.
Index d_o_bytes(const Problem& problem, const Program& backward) {
  const Block& stats = backward.slots[static_cast<std::size_t>(backward.input(Kind::Stats))].block;
  return bytes_of(Block{Kind::dO, stats.heads, stats.rows}, problem.shape(), problem.type());
}

}  // namespace

const char* name_of(Use use) {
  constexpr std::array<const char*, kUses> names{"inputs", "homes",     "staging",  "pseudo_keys",
                                                 "kept",   "kernels",   "weights",  "results",
                                                 "check",  "transport", "envelopes"};
  return names[static_cast<std::size_t>(use)];
}

Index Needs::sum() const { return std::accumulate(bytes.begin(), bytes.end(), Index{0}); }

Needs needs_of(const Problem& problem, const Program& forward, const Program* backward,
               const Beside& beside) {
  const Needs first = engine_needs(problem, forward, beside);
  Index results = result_bytes(problem, forward);
  std::vector<Needs> times{first};  // what there is at the same time
  times.back()[Use::results] = results;
  if (backward != nullptr) {
    times.push_back(engine_needs(problem, *backward, beside));
    if (problem.keeps()) times.back()[Use::kept] = first.sum() - kept_bytes(forward, problem);
    results += result_bytes(problem, *backward);
    times.back()[Use::results] = results + d_o_bytes(problem, *backward);
  }
  if (beside.check) {
    times.emplace_back()[Use::results] = results;
    times.back()[Use::check] = beside.check(problem, forward);
  }
  Needs most = *std::max_element(times.begin(), times.end(),
                                 [](const Needs& a, const Needs& b) { return a.sum() < b.sum(); });
  most[Use::transport] = beside.transport;
  most[Use::weights] = beside.weights;
  return most;
}

std::vector<Needs> needs_of(const Problem& problem, const std::vector<Planned>& passes,
                            const Beside& beside) {
  std::vector<Needs> all;
  const Plan& forward = passes.front().plan;
  for (std::size_t r = 0; r < forward.size(); ++r) {
    all.push_back(
        needs_of(problem, forward[r], passes.size() > 1 ? &passes[1].plan[r] : nullptr, beside));
  }
  return all;
}

}  // namespace dattn
