#include "parallel/moves.hpp"

#include <algorithm>

#include "kernels/area.hpp"
#include "kernels/check.hpp"

namespace dattn {

Writer::Writer(const Problem& problem, int rank) : problem_(problem) { program_.rank = rank; }

SlotId Writer::slot(Block block, int home) {
  program_.slots.push_back({std::move(block), home});
  return static_cast<SlotId>(program_.slots.size()) - 1;
}

const Block& Writer::block(SlotId slot) const {
  return program_.slots[static_cast<std::size_t>(slot)].block;
}

int Writer::home_of(SlotId slot) const {
  return program_.slots[static_cast<std::size_t>(slot)].home;
}

void Writer::send(SlotId slot, const Block& block, int peer) {
  if (!block.empty()) program_.steps.push_back(Send{slot, block, peer});
}

void Writer::recv(SlotId slot, const Block& block, int peer) {
  if (!block.empty()) program_.steps.push_back(Recv{slot, block, peer});
}

void Writer::attend(SlotId q, SlotId k, SlotId v, SlotId out) {
  const Runs queries = problem_.queries().positions(block(q).rows);
  const Runs keys = problem_.keys().positions(block(k).rows);
  for (const auto& [head, count] : variants(problem_.mask(), block(q).heads)) {
    if (allowed_pair(problem_.mask(), head, queries, keys)) {
      program_.steps.push_back(Attend{q, k, v, out});
      return;
    }
  }
}

void Writer::merge(SlotId from, SlotId into) {
  if (!block(into).empty()) program_.steps.push_back(Merge{from, into});
}

void Writer::reduce(SlotId slot, int axis) { program_.steps.push_back(Reduce{slot, axis}); }

Program Writer::finish(SlotId q, SlotId k, SlotId v, SlotId out, Block delivers) && {
  program_.q = q;
  program_.k = k;
  program_.v = v;
  program_.out = out;
  program_.delivers = std::move(delivers);
  return std::move(program_);
}

Block owned(const Problem& problem, Kind kind, int rank) {
  const bool of_queries = kind == Kind::Q || kind == Kind::O;
  Ranges rows;
  append(rows, (of_queries ? problem.queries() : problem.keys()).rows(rank));
  return {kind, {0, heads_of(kind, problem.shape())}, rows};
}

Inputs inputs(Writer& me) {
  const SlotId q = me.slot(owned(me.problem(), Kind::Q, me.rank()));
  const SlotId k = me.slot(owned(me.problem(), Kind::K, me.rank()));
  return {q, k, me.slot(owned(me.problem(), Kind::V, me.rank()))};
}

Program by_token(const Problem& problem, int rank,
                 const std::function<void(Writer&, const Inputs&, SlotId out)>& attend) {
  Writer me(problem, rank);
  const Inputs in = inputs(me);
  const Block mine = owned(problem, Kind::O, rank);
  const SlotId out = me.slot(mine);
  attend(me, in, out);
  return std::move(me).finish(in.q, in.k, in.v, out, mine);
}

void circulate(Writer& me, const std::vector<int>& ring, SlotId q, SlotId k, SlotId v, SlotId out,
               const std::function<Block(Kind, int member)>& held) {
  std::vector<int> homes;
  circulate(me, ring, q, k, v, out, held, homes);
}

void circulate(Writer& me, const std::vector<int>& ring, SlotId q, SlotId k, SlotId v, SlotId out,
               const std::function<Block(Kind, int member)>& held, std::vector<int>& homes) {
  const int members = static_cast<int>(ring.size());
  const int here = static_cast<int>(std::find(ring.begin(), ring.end(), me.rank()) - ring.begin());
  CHECK(here < members, me.rank());
  const int right = ring[static_cast<std::size_t>((here + 1) % members)];
  const int left = ring[static_cast<std::size_t>((here + members - 1) % members)];
  // Two homes for K, two for V: one pair is in use while the other fills.
  for (int hop = 0; hop < members; ++hop) {
    SlotId next_k = k;
    SlotId next_v = v;
    if (hop + 1 < members) {
      const int owner = ring[static_cast<std::size_t>((here + 2 * members - hop - 1) % members)];
      const std::size_t side = hop % 2 == 0 ? 0 : 2;
      if (homes.size() == side) {
        homes.push_back(me.home());
        homes.push_back(me.home());
      }
      next_k = me.slot(held(Kind::K, owner), homes[side]);
      next_v = me.slot(held(Kind::V, owner), homes[side + 1]);
      me.recv(next_k, me.block(next_k), left);
      me.recv(next_v, me.block(next_v), left);
      me.send(k, me.block(k), right);
      me.send(v, me.block(v), right);
    }
    me.attend(q, k, v, out);
    k = next_k;
    v = next_v;
  }
}

void redistribute(Writer& me, const std::vector<int>& group, const std::vector<Block>& from,
                  const std::vector<Block>& to, SlotId source, SlotId target) {
  const std::size_t members = group.size();
  const auto here =
      static_cast<std::size_t>(std::find(group.begin(), group.end(), me.rank()) - group.begin());
  CHECK(here < members, me.rank());
  // Everybody starts with another peer, so that no rank is everybody's first.
  for (std::size_t i = 0; i < members; ++i) {
    const std::size_t other = (here + members - i) % members;
    me.recv(target, intersect(from[other], to[here]), group[other]);
  }
  for (std::size_t i = 0; i < members; ++i) {
    const std::size_t other = (here + i) % members;
    me.send(source, intersect(from[here], to[other]), group[other]);
  }
}

void pull(Writer& me, SlotId q, SlotId k, SlotId v, SlotId out) {
  const Problem& problem = me.problem();
  const Shape& shape = problem.shape();
  const int ranks = problem.ranks();
  const auto& groups = problem.head_groups();
  const auto wanted = [&](Kind kind, std::size_t group, int reader, int owner) {
    const Range heads =
        kind == Kind::K ? shape.key_heads_of(groups[group]) : shape.value_heads_of(groups[group]);
    return Block{kind, heads, problem.keys().rows_at(owner, problem.keys_needed(reader, group))};
  };
  // Two stages are alive at a time: one is attended to while the next one arrives. A stage is what
  // one owner sends; a stage's slots reuse the homes of the stage before the last.
  struct Piece {
    SlotId q, k, v, out;
  };
  std::vector<int> homes[2];
  const auto post = [&](int distance, std::vector<Piece>& pieces) {
    const int owner = (me.rank() + ranks - distance) % ranks;
    const int reader = (me.rank() + distance) % ranks;
    auto& mine = homes[distance % 2];
    std::size_t used = 0;
    const auto place = [&](const Block& block) {
      if (used == mine.size()) mine.push_back(me.home());
      return me.slot(block, mine[used++]);
    };
    for (std::size_t g = 0; g < groups.size(); ++g) {
      const Block key = wanted(Kind::K, g, me.rank(), owner);
      if (!key.empty()) {
        const SlotId next_k = place(key);
        const SlotId next_v = place(wanted(Kind::V, g, me.rank(), owner));
        me.recv(next_k, me.block(next_k), owner);
        me.recv(next_v, me.block(next_v), owner);
        pieces.push_back({q, next_k, next_v, out});
      }
      const Block sent = wanted(Kind::K, g, reader, me.rank());
      if (!sent.empty()) {
        me.send(k, sent, reader);
        me.send(v, wanted(Kind::V, g, reader, me.rank()), reader);
      }
    }
  };
  std::vector<Piece> now{{q, k, v, out}};
  for (int distance = 0; distance < ranks; ++distance) {
    std::vector<Piece> next;
    if (distance + 1 < ranks) post(distance + 1, next);
    for (const Piece& p : now) me.attend(p.q, p.k, p.v, p.out);
    now = std::move(next);
  }
}

}  // namespace dattn
