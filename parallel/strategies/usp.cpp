// USP, unified sequence parallelism (Fang and Zhao 2024): Ulysses inside groups of ranks, rings
// between them. Either axis may be the inner one, that of neighbouring ranks: LoongTrain (Gu et al.
// 2024) calls the two head-first and context-first placement.
#include "parallel/strategies/usp.hpp"

#include <functional>
#include <map>
#include <utility>

#include "parallel/strategies/ulysses.hpp"

namespace dattn {
namespace {

/// What the members of a ring start with, found once for each: rings ask for every hop.
template <int heads>
class HeldByHead {
 public:
  HeldByHead(const Problem& problem, int rank)
      : problem_(problem),
        here_(static_cast<std::size_t>(problem.mesh().coordinate(rank, heads))) {}

  const Block& operator()(Kind kind, int member) {
    const auto [found, fresh] = known_.try_emplace({kind, member});
    if (fresh) {
      const std::vector<int> group = problem_.mesh().group(member, heads);
      found->second = exchange(problem_, kind, group).by_head[here_];
    }
    return found->second;
  }

 private:
  const Problem& problem_;
  std::size_t here_;
  std::map<std::pair<Kind, int>, Block> known_;
};

/// The ranks of a ring, but those whose group owns nothing: they would only pass on.
template <int ring, int heads>
std::vector<int> ring_of(const Problem& problem, int rank) {
  const Mesh& mesh = problem.mesh();
  std::vector<int> ranks = mesh.group(rank, ring);
  std::erase_if(ranks, [&](int member) { return own_nothing(problem, mesh.group(member, heads)); });
  return ranks;
}

template <int ring, int heads>
Program program(const Problem& problem, int rank) {
  const Mesh& mesh = problem.mesh();
  HeldByHead<heads> held(problem, rank);
  return within_heads(
      problem, rank, mesh.group(rank, heads), [&](Writer& me, const Inputs& in, SlotId out) {
        circulate(
            me, ring_of<ring, heads>(problem, rank), in.q, in.k, in.v, out, std::ref(held), {},
            [&](int member) { return mesh.group(member, heads); });
      });
}

template <int ring, int heads>
Program backward(const Problem& problem, int rank) {
  const Mesh& mesh = problem.mesh();
  HeldByHead<heads> held(problem, rank);
  return within_heads_backward(
      problem, rank, mesh.group(rank, heads), [&](Writer& me, const AttendBackward& mine) {
        circulate_backward(
            me, ring_of<ring, heads>(problem, rank), mine, std::ref(held), {},
            [&](int member) { return mesh.group(member, heads); });
      });
}

std::optional<std::string> refuses_other_than(std::string_view axes, const Problem& problem) {
  if (problem.mesh().axes.size() == 2) return std::nullopt;
  return "takes a mesh of two axes, " + std::string(axes) + ", as in --mesh 2x3, not '" +
         problem.mesh().text() + "'";
}
std::optional<std::string> refuses_usp(const Problem& problem) {
  return refuses_other_than("ring x heads", problem);
}
std::optional<std::string> refuses_inner_ring(const Problem& problem) {
  return refuses_other_than("heads x ring", problem);
}

/// Members of a group that splits heads: as many as make the mesh square, and no more than heads.
int group_size(int ranks, const Shape& shape) {
  int size = 1;
  for (int i = 1; i * i <= ranks; ++i) {
    if (ranks % i == 0 && i <= shape.query_heads) size = i;
  }
  return size;
}
Mesh usp_mesh(int ranks, const Shape& shape) {
  const int group = group_size(ranks, shape);
  return {{{"ring", ranks / group}, {"heads", group}}};
}
Mesh inner_ring_mesh(int ranks, const Shape& shape) {
  const int group = group_size(ranks, shape);
  return {{{"heads", group}, {"ring", ranks / group}}};
}

}  // namespace

Strategy usp_strategy() {
  return {"usp",
          "a ring between groups of neighbouring ranks, heads split inside each group",
          "a mesh of two axes, ring x heads (default: as they share hosts, else square)",
          "ring,heads",
          program<0, 1>,
          backward<0, 1>,
          refuses_usp,
          usp_mesh};
}

Strategy usp_inner_ring_strategy() {
  return {"usp_inner_ring",
          "usp the other way about: rings of neighbouring ranks, heads split between the rings",
          "a mesh of two axes, heads x ring (default: as they share hosts, else square)",
          "heads,ring",
          program<1, 0>,
          backward<1, 0>,
          refuses_inner_ring,
          inner_ring_mesh};
}

}  // namespace dattn
