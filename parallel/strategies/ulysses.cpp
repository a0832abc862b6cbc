// DeepSpeed-Ulysses (Jacobs et al. 2023), for any number of heads and tokens: an exchange of Q, K
// and V from tokens to heads, attention over the whole sequence, and the exchange of O back.
#include "parallel/strategies/ulysses.hpp"

#include <algorithm>

namespace dattn {
namespace {

Program program(const Problem& problem, int rank) {
  return within_heads(
      problem, rank, problem.mesh().group(rank, 0),
      [](Writer& me, const Inputs& in, SlotId out) { me.attend(in.q, in.k, in.v, out); });
}

Program backward(const Problem& problem, int rank) {
  return within_heads_backward(
      problem, rank, problem.mesh().group(rank, 0),
      [](Writer& me, const AttendBackward& mine) { me.attend_backward(mine); });
}

}  // namespace

Range heads_of_member(const Shape& shape, Kind kind, int members, int member) {
  const Range heads = even_part(shape.query_heads, members, member);
  return heads_touched(kind, heads, shape);
}

Exchange exchange(const Problem& problem, Kind kind, const std::vector<int>& group) {
  Exchange e;
  Ranges rows;
  for (const int rank : group) {
    e.by_token.push_back(owned(problem, kind, rank));
    for (const Range r : e.by_token.back().rows) append(rows, r);
  }
  const int members = static_cast<int>(group.size());
  for (int i = 0; i < members; ++i) {
    e.by_head.push_back({kind, heads_of_member(problem.shape(), kind, members, i), rows});
  }
  return e;
}

Program within_heads(const Problem& problem, int rank, const std::vector<int>& group,
                     const std::function<void(Writer&, const Inputs&, SlotId out)>& attend) {
  Writer me(problem, rank);
  const auto here = static_cast<std::size_t>(place_in(group, rank));
  const Inputs in = inputs(me);
  const auto to_heads = [&](Kind kind, SlotId source) {
    const Exchange e = exchange(problem, kind, group);
    const SlotId target = me.slot(e.by_head[here]);
    redistribute(me, group, e.by_token, e.by_head, source, target);
    return target;
  };
  const Inputs by_head{to_heads(Kind::Q, in.q), to_heads(Kind::K, in.k), to_heads(Kind::V, in.v)};
  const Exchange back = exchange(problem, Kind::O, group);
  const SlotId found = me.slot(back.by_head[here]);
  attend(me, by_head, found);
  const SlotId out = me.slot(back.by_token[here]);
  redistribute(me, group, back.by_head, back.by_token, found, out);
  return std::move(me).finish(in.q, in.k, in.v, out, back.by_token[here]);
}

Program within_heads_backward(const Problem& problem, int rank, const std::vector<int>& group,
                              const std::function<void(Writer&, const AttendBackward&)>& attend) {
  Writer me(problem, rank);
  const auto here = static_cast<std::size_t>(place_in(group, rank));
  AttendBackward mine = backward_inputs(me);
  AttendBackward by_head{};
  for (const Kind kind : input_kinds(Pass::backward)) {
    const Exchange e = exchange(problem, kind, group);
    operand(by_head, kind) = me.slot(e.by_head[here]);
    redistribute(me, group, e.by_token, e.by_head, operand(mine, kind), operand(by_head, kind));
  }
  for (const Kind kind : result_kinds(Pass::backward)) {
    operand(by_head, kind) = me.slot(exchange(problem, kind, group).by_head[here]);
  }
  attend(me, by_head);
  for (const Kind kind : result_kinds(Pass::backward)) {
    const Exchange e = exchange(problem, kind, group);
    collect(me, group, e.by_head, e.by_token, operand(by_head, kind), operand(mine, kind));
  }
  return std::move(me).finish(mine);
}

Strategy ulysses_strategy() {
  return {"ulysses",
          "tokens are exchanged for heads, each rank computes its heads over all tokens",
          "any ranks (those beyond the query heads stay idle), any heads, any partition",
          "ranks",
          program,
          backward,
          refuses_other_than_a_line,
          line_mesh};
}

}  // namespace dattn
