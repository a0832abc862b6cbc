#include "parallel/strategies/local.hpp"

#include "parallel/moves.hpp"

namespace dattn {
namespace {

Program program(const Problem& problem, int rank) {
  return by_token(problem, rank, [](Writer& me, const Inputs& in, SlotId out) {
    me.attend(in.q, in.k, in.v, out);
  });
}

Program backward(const Problem& problem, int rank) {
  return by_token_backward(
      problem, rank, [](Writer& me, const AttendBackward& mine) { me.attend_backward(mine); });
}

std::optional<std::string> refuses(const Problem& problem) {
  if (problem.ranks() == 1) return std::nullopt;
  return "runs on one rank, not " + std::to_string(problem.ranks()) +
         "; start one, or choose another strategy";
}

}  // namespace

Strategy local_strategy() {
  return {"local",  "one rank computes everything", "one rank", "ranks", program, backward, refuses,
          line_mesh};
}

}  // namespace dattn
