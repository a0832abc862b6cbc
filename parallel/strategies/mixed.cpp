// Heads that differ (retrieval and streaming heads, DuoAttention, Xiao et al. 2024), each kind in
// the way that suits it: those that see everything share a ring of all ranks; those that see little
// go whole to one rank each, placed by cost, and are computed where the ring would wait.
#include "parallel/strategies/mixed.hpp"

#include "parallel/moves.hpp"
#include "parallel/strategies/ulysses.hpp"

namespace dattn {
namespace {

/// The heads of `kind` that these query heads bear on, of the rows of `rank`.
Block part(const Problem& problem, Kind kind, const Ranges& heads, int rank) {
  return {kind, heads_touched(kind, heads, problem.shape()), owned(problem, kind, rank).rows};
}

/// What the ranks hold of the heads that one rank computes whole, before and after an exchange.
Exchange exchange_of_whole(const Problem& problem, Kind kind, const std::vector<int>& group) {
  return exchange(problem, kind, group, problem.head_split().whole);
}

/// A slot of its own for the part of `source` that the ring moves, and the copy.
SlotId copied(Writer& me, SlotId source) {
  const Kind kind = me.block(source).kind;
  const SlotId copy =
      me.slot(part(me.problem(), kind, me.problem().head_split().shared, me.rank()));
  me.recv(copy, me.block(copy), me.rank());
  me.send(source, me.block(copy), me.rank());
  return copy;
}

Program program(const Problem& problem, int rank) {
  const std::vector<int> group = problem.hosts().side_by_side(problem.mesh().group(rank, 0));
  const auto here = static_cast<std::size_t>(place_in(group, rank));
  const Ranges& shared = problem.head_split().shared;
  return by_token(problem, rank, [&](Writer& me, const Inputs& in, SlotId out) {
    const auto to_heads = [&](Kind kind, SlotId source) {
      const Exchange e = exchange_of_whole(problem, kind, group);
      const SlotId target = me.slot(e.by_head[here]);
      redistribute(me, group, e.by_token, e.by_head, source, target);
      return target;
    };
    const Inputs whole{to_heads(Kind::Q, in.q), to_heads(Kind::K, in.k), to_heads(Kind::V, in.v)};
    const Exchange back = exchange_of_whole(problem, Kind::O, group);
    const SlotId found = me.slot(back.by_head[here]);
    const SlotId home = me.slot(back.by_token[here]);
    const SlotId sum = me.slot(part(problem, Kind::O, shared, rank));
    circulate(
        me, group, copied(me, in.q), copied(me, in.k), copied(me, in.v), sum,
        [&](Kind kind, int member) { return part(problem, kind, shared, member); },
        [&] {
          me.attend(whole.q, whole.k, whole.v, found);
          redistribute(me, group, back.by_head, back.by_token, found, home);
        });
    me.merge(sum, out);
    me.merge(home, out);
  });
}

Program backward(const Problem& problem, int rank) {
  const std::vector<int> group = problem.hosts().side_by_side(problem.mesh().group(rank, 0));
  const auto here = static_cast<std::size_t>(place_in(group, rank));
  const Ranges& shared = problem.head_split().shared;
  return by_token_backward(problem, rank, [&](Writer& me, AttendBackward mine) {
    AttendBackward whole{};
    AttendBackward home{};
    AttendBackward ring{};
    for (const Kind kind : input_kinds(Pass::backward)) {
      const Exchange e = exchange_of_whole(problem, kind, group);
      operand(whole, kind) = me.slot(e.by_head[here]);
      redistribute(me, group, e.by_token, e.by_head, operand(mine, kind), operand(whole, kind));
    }
    for (const Kind kind : input_kinds(Pass::backward)) {
      operand(ring, kind) = copied(me, operand(mine, kind));
    }
    for (const Kind kind : result_kinds(Pass::backward)) {
      const Exchange e = exchange_of_whole(problem, kind, group);
      operand(whole, kind) = me.slot(e.by_head[here]);
      operand(home, kind) = me.slot(e.by_token[here]);
      operand(ring, kind) = me.slot(part(problem, kind, shared, rank));
    }
    circulate_backward(
        me, group, ring, [&](Kind kind, int member) { return part(problem, kind, shared, member); },
        [&] {
          me.attend_backward(whole);
          for (const Kind kind : result_kinds(Pass::backward)) {
            const Exchange e = exchange_of_whole(problem, kind, group);
            collect(me, group, e.by_head, e.by_token, operand(whole, kind), operand(home, kind));
          }
        });
    for (const Kind kind : result_kinds(Pass::backward)) {
      me.add(operand(ring, kind), operand(mine, kind));
      me.add(operand(home, kind), operand(mine, kind));
    }
  });
}

std::optional<std::string> refuses(const Problem& problem) {
  if (auto why = refuses_other_than_a_line(problem)) return why;
  for (const Ranges& heads : problem.head_split().whole) {
    if (!heads.empty()) return std::nullopt;
  }
  return "needs heads that see at most a quarter of what others see: give --head-masks";
}

}  // namespace

Strategy mixed_strategy() {
  return {"mixed",
          "heads that see much share a ring, the others go whole to one rank each, by cost",
          "heads that see at most a quarter of what others see; any ranks, any partition",
          "ranks",
          program,
          backward,
          refuses,
          line_mesh,
          true};
}

}  // namespace dattn
