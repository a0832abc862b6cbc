#pragma once

#include "parallel/moves.hpp"

namespace dattn {

/// As LightSeq, on 3 ranks under a contiguous causal partition: rank 0, which has least to do,
/// attends the queries of rank 2 to its own keys and sends back the Partial.
inline Plan helper_plan(const Problem& problem) {
  Plan plan;
  for (int rank = 0; rank < 3; ++rank) {
    Writer me(problem, rank);
    const auto [q, k, v] = inputs(me);
    const Block mine = owned(problem, Kind::O, rank);
    const SlotId out = me.slot(mine);
    const auto fetched = [&](Kind kind, int from) {
      const SlotId s = me.slot(owned(problem, kind, from));
      me.recv(s, me.block(s), from);
      return s;
    };
    if (rank == 0) {
      const SlotId guest = fetched(Kind::Q, 2);
      me.send(k, me.block(k), 1);
      me.send(v, me.block(v), 1);
      me.attend(q, k, v, out);
      const SlotId found = me.slot(owned(problem, Kind::O, 2));
      me.attend(guest, k, v, found);
      me.send(found, me.block(found), 2);
    } else {
      if (rank == 2) me.send(q, me.block(q), 0);
      const SlotId near_k = fetched(Kind::K, rank - 1);
      const SlotId near_v = fetched(Kind::V, rank - 1);
      if (rank == 1) {
        me.send(k, me.block(k), 2);
        me.send(v, me.block(v), 2);
      }
      me.attend(q, k, v, out);
      me.attend(q, near_k, near_v, out);
      if (rank == 2) {
        const SlotId found = me.slot(mine);
        me.recv(found, mine, 0);
        me.merge(found, out);
      }
    }
    plan.push_back(std::move(me).finish(q, k, v, out, mine));
  }
  return plan;
}

/// All queries on every rank of a mesh of two axes, merged along one axis and then the other.
inline Plan two_reduces(const Problem& problem) {
  Plan plan;
  for (int rank = 0; rank < problem.ranks(); ++rank) {
    Writer me(problem, rank);
    const Range heads{0, problem.shape().query_heads};
    const Ranges rows{{0, problem.queries().tokens()}};
    const SlotId q = me.slot({Kind::Q, heads, rows});
    const SlotId k = me.slot(owned(problem, Kind::K, rank));
    const SlotId v = me.slot(owned(problem, Kind::V, rank));
    const SlotId out = me.slot({Kind::O, heads, rows});
    me.attend(q, k, v, out);
    me.reduce(out, 1);
    me.reduce(out, 0);
    plan.push_back(std::move(me).finish(q, k, v, out, owned(problem, Kind::O, rank)));
  }
  return plan;
}

}  // namespace dattn
