// Tree attention (Shyam et al. 2024) with its three all-reduces fused to one by the merge of
// (m, l, a) records: for few queries against many keys, as in decoding.
#include "parallel/strategies/tree.hpp"

#include "parallel/moves.hpp"

namespace dattn {
namespace {

/// A reduction rounded on its way up and down would lose more the more ranks there are, and few
/// queries are few bytes.
void reduce(Writer& me, SlotId sum) {
  if (is_rounded(me.block(sum).kind, me.problem())) me.note("the all-reduce is not rounded");
  me.reduce(sum, 0);
}

Program program(const Problem& problem, int rank) {
  Writer me(problem, rank);
  Ranges rows;
  append(rows, {0, problem.queries().tokens()});
  const Range heads{0, problem.shape().query_heads};
  const SlotId q = me.slot({Kind::Q, heads, rows});
  const SlotId k = me.slot(owned(problem, Kind::K, rank));
  const SlotId v = me.slot(owned(problem, Kind::V, rank));
  const SlotId out = me.slot({Kind::O, heads, rows});
  me.attend(q, k, v, out);
  if (problem.ranks() > 1) reduce(me, out);
  return std::move(me).finish(q, k, v, out, owned(problem, Kind::O, rank));
}

/// dO comes to every rank as Q does; of the Stats each rank has its own queries' and gets the rest.
Program backward(const Problem& problem, int rank) {
  Writer me(problem, rank);
  Ranges rows;
  append(rows, {0, problem.queries().tokens()});
  const auto of_all = [&](Kind kind) {
    return Block{kind, {0, problem.shape().query_heads}, rows};
  };
  AttendBackward in = backward_inputs(me, [&](Kind kind) {
    return kind == Kind::Q || kind == Kind::dO || kind == Kind::dQ ? of_all(kind)
                                                                   : owned(problem, kind, rank);
  });
  AttendBackward work = in;
  if (problem.ranks() > 1) {
    const std::vector<int> group = problem.mesh().group(rank, 0);
    std::vector<Block> own;
    for (const int member : group) own.push_back(owned(problem, Kind::Stats, member));
    work.stats = me.slot(of_all(Kind::Stats));
    redistribute(me, group, own, std::vector<Block>(group.size(), of_all(Kind::Stats)), in.stats,
                 work.stats);
  }
  me.attend_backward(work);
  if (problem.ranks() > 1) reduce(me, in.dq);
  return std::move(me).finish(in);
}

}  // namespace

Strategy tree_strategy() {
  return {"tree",
          "every rank attends all queries to its share of the keys, one all-reduce merges",
          "all queries on every rank, so few of them; any ranks, any heads, any partition",
          "ranks",
          program,
          backward,
          refuses_other_than_a_line,
          line_mesh,
          true};
}

}  // namespace dattn
