// Ring attention (Liu, Zaharia, Abbeel 2023). With the zigzag or the striped partition it is the
// balanced causal ring of the same name; the program does not differ, the mask decides which tiles
// exist.
#include "parallel/strategies/ring.hpp"

#include "parallel/moves.hpp"

namespace dattn {
namespace {

/// All ranks that own anything, those of a host side by side, so that one link of the ring leaves
/// each host. The others would only pass on what they do not need.
std::vector<int> ring_of(const Problem& problem) {
  std::vector<int> ranks = problem.mesh().group(0, 0);
  std::erase_if(ranks, [&](int rank) { return owns_nothing(problem, rank); });
  return problem.hosts().side_by_side(std::move(ranks));
}

Program program(const Problem& problem, int rank) {
  return by_token(problem, rank, [&](Writer& me, const Inputs& in, SlotId out) {
    if (owns_nothing(problem, rank)) return;
    circulate(me, ring_of(problem), in.q, in.k, in.v, out,
              [&](Kind kind, int member) { return owned(problem, kind, member); });
  });
}

Program backward(const Problem& problem, int rank) {
  return by_token_backward(problem, rank, [&](Writer& me, const AttendBackward& mine) {
    if (owns_nothing(problem, rank)) return;
    circulate_backward(me, ring_of(problem), mine,
                       [&](Kind kind, int member) { return owned(problem, kind, member); });
  });
}

}  // namespace

Strategy ring_strategy() {
  return {"ring",
          "keys and values go once around the ring of all ranks while each rank attends",
          "any ranks, any heads, any partition",
          "ranks",
          program,
          backward,
          refuses_other_than_a_line,
          line_mesh};
}

}  // namespace dattn
