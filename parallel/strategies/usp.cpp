// USP, unified sequence parallelism (Fang and Zhao 2024): Ulysses inside groups of neighbouring
// ranks, a ring between the groups.
#include "parallel/strategies/usp.hpp"

#include "parallel/strategies/ulysses.hpp"

namespace dattn {
namespace {

constexpr int kRing = 0;
constexpr int kHeads = 1;

Program program(const Problem& problem, int rank) {
  const Mesh& mesh = problem.mesh();
  const auto here = static_cast<std::size_t>(mesh.coordinate(rank, kHeads));
  return within_heads(
      problem, rank, mesh.group(rank, kHeads), [&](Writer& me, const Inputs& in, SlotId out) {
        circulate(me, mesh.group(rank, kRing), in.q, in.k, in.v, out, [&](Kind kind, int member) {
          return exchange(problem, kind, mesh.group(member, kHeads)).by_head[here];
        });
      });
}

Program backward(const Problem& problem, int rank) {
  const Mesh& mesh = problem.mesh();
  const auto here = static_cast<std::size_t>(mesh.coordinate(rank, kHeads));
  return within_heads_backward(
      problem, rank, mesh.group(rank, kHeads), [&](Writer& me, const AttendBackward& mine) {
        circulate_backward(me, mesh.group(rank, kRing), mine, [&](Kind kind, int member) {
          return exchange(problem, kind, mesh.group(member, kHeads)).by_head[here];
        });
      });
}

std::optional<std::string> refuses(const Problem& problem) {
  if (problem.mesh().axes.size() == 2) return std::nullopt;
  return "takes a mesh of two axes, ring x heads, as in --mesh 2x3, not '" + problem.mesh().text() +
         "'";
}

/// As square as the ranks allow, with no more members of a group than heads.
Mesh mesh(int ranks, const Shape& shape) {
  int inner = 1;
  for (int i = 1; i * i <= ranks; ++i) {
    if (ranks % i == 0 && i <= shape.query_heads) inner = i;
  }
  return {{{"ring", ranks / inner}, {"heads", inner}}};
}

}  // namespace

Strategy usp_strategy() {
  return {"usp",
          "a ring between groups of neighbouring ranks, heads split inside each group",
          "a mesh of two axes, ring x heads (default: as square as possible)",
          "ring,heads",
          program,
          refuses,
          mesh,
          backward};
}

}  // namespace dattn
