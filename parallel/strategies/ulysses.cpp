// DeepSpeed-Ulysses (Jacobs et al. 2023), for any number of heads and tokens: an exchange of Q, K
// and V from tokens to heads, attention over the whole sequence, and the exchange of O back.
#include "parallel/strategies/ulysses.hpp"

#include <algorithm>
#include <cstdio>

namespace dattn {
namespace {

/// Whether `rank`, at place `here` of a group, owns nothing and has no heads.
bool is_idle(const Problem& problem, int rank, const Placement& placed, int here) {
  return owns_nothing(problem, rank) && placed.heads[static_cast<std::size_t>(here)].empty();
}

/// The same, or the group owns nothing that it could have heads of.
bool is_idle(const Problem& problem, int rank, const std::vector<int>& group) {
  return is_idle(problem, rank, problem.placement(group), place_in(group, rank)) ||
         own_nothing(problem, group);
}

/// The same of all ranks, told without a list of them: of many more ranks than tokens or heads
/// nearly all are idle, and then even to make the list takes long. False where speeds count.
bool is_idle(const Problem& problem, int rank) {
  return problem.speeds().equal() && is_idle(problem, rank, problem.placement(problem.ranks()),
                                             problem.mesh().coordinate(rank, 0));
}

Program idle(const Problem& problem, int rank) {
  Writer me(problem, rank);
  const Inputs in = inputs(me);
  const Block none = owned(problem, Kind::O, rank);
  const SlotId out = me.slot(none);
  return std::move(me).finish(in.q, in.k, in.v, out, none);
}

Program idle_backward(const Problem& problem, int rank) {
  Writer me(problem, rank);
  return std::move(me).finish(backward_inputs(me));
}

Program program(const Problem& problem, int rank) {
  if (is_idle(problem, rank)) return idle(problem, rank);
  return within_heads(
      problem, rank, problem.mesh().group(rank, 0),
      [](Writer& me, const Inputs& in, SlotId out) { me.attend(in.q, in.k, in.v, out); });
}

Program backward(const Problem& problem, int rank) {
  if (is_idle(problem, rank)) return idle_backward(problem, rank);
  return within_heads_backward(
      problem, rank, problem.mesh().group(rank, 0),
      [](Writer& me, const AttendBackward& mine) { me.attend_backward(mine); });
}

/// Whether `group` keeps Q, K and V by head. A single member's lie by head from the start.
bool keeps_by_head(const Problem& problem, const std::vector<int>& group) {
  return problem.keeps() && group.size() > 1;
}

/// For people: how much the placement of heads by cost evens out.
void note_placement(Writer& me, const std::vector<int>& group) {
  const Placement& placed = me.problem().placement(group);
  if (placed.even) return;
  char text[120];
  std::snprintf(
      text, sizeof text,
      "heads are placed by cost: the most loaded has %.2f of the mean, %.2f in even parts",
      placed.most, placed.most_even);
  me.note(text);
}

/// What it is that was chosen, for people: bytes that all of `group` keep, and send otherwise.
std::string note_of(const Problem& problem, const std::vector<int>& group) {
  Index kept = 0;
  Index sent = 0;
  const auto bytes = [&](const Block& block) {
    return bytes_of(block, problem.shape(), problem.type());
  };
  for (const Kind kind : input_kinds(Pass::forward)) {
    const Exchange e = exchange(problem, kind, group);
    for (std::size_t i = 0; i < group.size(); ++i) {
      kept += bytes(e.by_head[i]);
      sent += bytes(e.by_head[i]) - bytes(intersect(e.by_head[i], e.by_token[i]));
    }
  }
  const std::string k = std::to_string(kept);
  const std::string s = std::to_string(sent);
  return problem.keeps()
             ? "Q, K, V by head are kept, " + k + " bytes of a group; to send them again is " + s
             : "Q, K, V are sent again, " + s + " bytes in a group; to keep them by head takes " +
                   k;
}

}  // namespace

Exchange exchange(const Problem& problem, Kind kind, const std::vector<int>& group) {
  return exchange(problem, kind, group, problem.placement(group).heads);
}

Exchange exchange(const Problem& problem, Kind kind, const std::vector<int>& group,
                  const std::vector<Ranges>& heads) {
  std::vector<Range> every;
  for (const Ranges& some : heads) every.insert(every.end(), some.begin(), some.end());
  const Ranges all = heads_touched(kind, union_of(std::move(every)), problem.shape());
  Exchange e;
  Ranges rows;
  for (const int rank : group) {
    e.by_token.push_back({kind, all, owned(problem, kind, rank).rows});
    for (const Range r : e.by_token.back().rows) append(rows, r);
  }
  for (const Ranges& some : heads) {
    e.by_head.push_back({kind, heads_touched(kind, some, problem.shape()), rows});
  }
  return e;
}

Program within_heads(const Problem& problem, int rank, const std::vector<int>& group,
                     const std::function<void(Writer&, const Inputs&, SlotId out)>& attend) {
  if (is_idle(problem, rank, group)) return idle(problem, rank);
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
  if (keeps_by_head(problem, group)) {
    for (const SlotId slot : {by_head.q, by_head.k, by_head.v}) me.keep(slot);
  }
  const Exchange back = exchange(problem, Kind::O, group);
  const SlotId found = me.slot(back.by_head[here]);
  note_placement(me, group);
  attend(me, by_head, found);
  const SlotId out = me.slot(back.by_token[here]);
  redistribute(me, group, back.by_head, back.by_token, found, out);
  return std::move(me).finish(in.q, in.k, in.v, out, back.by_token[here]);
}

Program within_heads_backward(const Problem& problem, int rank, const std::vector<int>& group,
                              const std::function<void(Writer&, const AttendBackward&)>& attend) {
  if (is_idle(problem, rank, group)) return idle_backward(problem, rank);
  Writer me(problem, rank);
  const auto here = static_cast<std::size_t>(place_in(group, rank));
  const auto is_kept = [&](Kind kind) {
    return keeps_by_head(problem, group) && (kind == Kind::Q || kind == Kind::K || kind == Kind::V);
  };
  AttendBackward mine = backward_inputs(me, [&](Kind kind) {
    return is_kept(kind) ? exchange(problem, kind, group).by_head[here]
                         : owned(problem, kind, rank);
  });
  AttendBackward by_head = mine;
  for (const Kind kind : input_kinds(Pass::backward)) {
    if (is_kept(kind)) continue;
    const Exchange e = exchange(problem, kind, group);
    operand(by_head, kind) = me.slot(e.by_head[here]);
    redistribute(me, group, e.by_token, e.by_head, operand(mine, kind), operand(by_head, kind));
  }
  for (const Kind kind : result_kinds(Pass::backward)) {
    operand(by_head, kind) = me.slot(exchange(problem, kind, group).by_head[here]);
  }
  note_placement(me, group);
  if (group.size() > 1) me.note(note_of(problem, group));
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
          line_mesh,
          true};
}

}  // namespace dattn
