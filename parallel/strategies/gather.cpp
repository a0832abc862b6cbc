// Direct exchange without redundant bytes, as the group-cast of MagiAttention: what moves is what
// the mask can see, from the owner to the reader, in as many stages as there are owners.
#include "parallel/strategies/gather.hpp"

#include "parallel/moves.hpp"

namespace dattn {
namespace {

Program program(const Problem& problem, int rank) {
  return by_token(problem, rank, [](Writer& me, const Inputs& in, SlotId out) {
    pull(me, in.q, in.k, in.v, out);
  });
}

Program backward(const Problem& problem, int rank) {
  return by_token_backward(problem, rank, pull_backward);
}

}  // namespace

Strategy gather_strategy() {
  return {"gather",
          "each rank fetches just the keys its mask can see from their owners, in stages",
          "any ranks, any heads, any partition",
          "ranks",
          program,
          backward,
          refuses_other_than_a_line,
          line_mesh,
          true};
}

}  // namespace dattn
