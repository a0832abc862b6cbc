#include "parallel/strategies/local.hpp"

#include "parallel/moves.hpp"

namespace dattn {
namespace {

Program program(const Problem& problem, int rank) {
  Writer me(problem, rank);
  const auto [q, k, v] = inputs(me);
  const Block mine = owned(problem, Kind::O, rank);
  const SlotId out = me.slot(mine);
  me.attend(q, k, v, out);
  return std::move(me).finish(q, k, v, out, mine);
}

std::optional<std::string> refuses(const Problem& problem) {
  if (problem.ranks() == 1) return std::nullopt;
  return "runs on one rank, not " + std::to_string(problem.ranks()) +
         "; start one, or choose another strategy";
}

}  // namespace

Strategy local_strategy() {
  return {"local",  "one rank computes everything", "one rank", "ranks", program, refuses,
          line_mesh};
}

}  // namespace dattn
