#include "parallel/moves.hpp"

#include <algorithm>
#include <deque>
#include <map>
#include <utility>

#include "kernels/area.hpp"
#include "kernels/check.hpp"
#include "parallel/couriers.hpp"

namespace dattn {

int place_in(const std::vector<int>& group, int rank) {
  const auto found = std::find(group.begin(), group.end(), rank);
  CHECK(found != group.end(), rank);
  return static_cast<int>(found - group.begin());
}

Writer::Writer(const Problem& problem, int rank) : problem_(problem) { program_.rank = rank; }

SlotId Writer::slot(Block block, int home) {
  used_.resize(static_cast<std::size_t>(program_.homes), false);
  used_[static_cast<std::size_t>(home)] = true;
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

bool Writer::sees(SlotId q, SlotId k) const {
  const Runs queries = problem_.queries().positions(block(q).rows);
  const Runs keys = problem_.keys().positions(block(k).rows);
  const Ranges served = query_heads_of(Kind::K, block(k).heads, problem_.shape());
  for (const Range heads : intersect(block(q).heads, served)) {
    for (const auto& [head, count] : variants(problem_.mask(), heads)) {
      if (allowed_pair(problem_.mask(), head, queries, keys)) return true;
    }
  }
  return false;
}

void Writer::attend(SlotId q, SlotId k, SlotId v, SlotId out) {
  if (sees(q, k)) program_.steps.push_back(Attend{q, k, v, out});
}

void Writer::attend_backward(const AttendBackward& slots) {
  if (sees(slots.q, slots.k)) program_.steps.push_back(slots);
}

void Writer::merge(SlotId from, SlotId into) {
  if (!block(from).empty()) program_.steps.push_back(Merge{from, into});
}

void Writer::add(SlotId from, SlotId into) {
  if (!block(from).empty()) program_.steps.push_back(Add{from, into});
}

void Writer::reduce(SlotId slot, int axis) { program_.steps.push_back(Reduce{slot, axis}); }

SlotId Writer::fresh(Block block, int home) {
  const bool first =
      used_.size() <= static_cast<std::size_t>(home) || !used_[static_cast<std::size_t>(home)];
  const bool empty = block.empty();
  const SlotId s = slot(std::move(block), home);
  if (!first && !empty) program_.steps.push_back(Clear{s});
  return s;
}

Program Writer::finish(SlotId q, SlotId k, SlotId v, SlotId out, Block delivers) && {
  program_.inputs = {q, k, v};
  program_.results = {{out, std::move(delivers)}};
  return std::move(program_);
}

Program Writer::finish(const AttendBackward& slots) && {
  program_.pass = Pass::backward;
  program_.inputs = {slots.q, slots.k, slots.v, slots.d_o, slots.stats};
  for (const SlotId s : {slots.dq, slots.dk, slots.dv}) {
    program_.results.push_back({s, owned(problem_, block(s).kind, rank())});
  }
  return std::move(program_);
}

Block owned(const Problem& problem, Kind kind, int rank) {
  Ranges rows;
  append(rows, (of_queries(kind) ? problem.queries() : problem.keys()).rows(rank));
  return {kind, {0, heads_of(kind, problem.shape())}, rows};
}

bool owns_nothing(const Problem& problem, int rank) {
  return problem.queries().rows(rank).empty() && problem.keys().rows(rank).empty();
}

bool own_nothing(const Problem& problem, const std::vector<int>& ranks) {
  return std::all_of(ranks.begin(), ranks.end(),
                     [&](int rank) { return owns_nothing(problem, rank); });
}

Inputs inputs(Writer& me) {
  const SlotId q = me.slot(owned(me.problem(), Kind::Q, me.rank()));
  const SlotId k = me.slot(owned(me.problem(), Kind::K, me.rank()));
  return {q, k, me.slot(owned(me.problem(), Kind::V, me.rank()))};
}

AttendBackward backward_inputs(Writer& me, const std::function<Block(Kind)>& block) {
  AttendBackward all{};
  for (const auto kinds : {input_kinds(Pass::backward), result_kinds(Pass::backward)}) {
    for (const Kind kind : kinds) operand(all, kind) = me.slot(block(kind));
  }
  return all;
}

AttendBackward backward_inputs(Writer& me) {
  return backward_inputs(me, [&](Kind kind) { return owned(me.problem(), kind, me.rank()); });
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

Program by_token_backward(const Problem& problem, int rank,
                          const std::function<void(Writer&, const AttendBackward&)>& attend) {
  Writer me(problem, rank);
  const AttendBackward mine = backward_inputs(me);
  attend(me, mine);
  return std::move(me).finish(mine);
}

void circulate(Writer& me, const std::vector<int>& ring, SlotId q, SlotId k, SlotId v, SlotId out,
               const Held& held, const std::function<void()>& meanwhile,
               const StandsFor& stands_for) {
  const Strips strips(me.problem(), ring, me.rank(), false, held, stands_for);
  std::vector<int> homes;
  circulate(me, strips, q, {{k, v}}, out, homes, meanwhile);
}

void circulate(Writer& me, const Strips& strips, SlotId q, const KeySlots& mine, SlotId out,
               std::vector<int>& homes, const std::function<void()>& meanwhile) {
  const int members = strips.members();
  const std::size_t count = strips.count();
  const int right = strips.member(1);
  const int left = strips.member(-1);
  // Pairs of homes for each strip, one for K and one for V: one pair is in use while the others
  // fill. Messages of two ranks meet in order: those of other work must not come between a receive
  // that is posted far ahead and its send.
  const int ahead = meanwhile ? 1 : me.problem().prefetch();
  std::deque<KeySlots> next;
  const auto fetch = [&](int hop) {
    KeySlots& stage = next.emplace_back();
    for (std::size_t s = 0; s < count; ++s) {
      const std::size_t pair = static_cast<std::size_t>((hop - 1) % (ahead + 1)) * count + s;
      while (homes.size() <= 2 * pair + 1) homes.push_back(me.home());
      stage.emplace_back(me.slot(strips.arriving(Kind::K, s, hop), homes[2 * pair]),
                         me.slot(strips.arriving(Kind::V, s, hop), homes[2 * pair + 1]));
      me.recv(stage.back().first, me.block(stage.back().first), left);
      me.recv(stage.back().second, me.block(stage.back().second), left);
    }
  };
  for (int hop = 1; hop < std::min(ahead, members); ++hop) fetch(hop);
  KeySlots now = mine;
  for (int hop = 0; hop < members; ++hop) {
    if (hop + ahead < members) fetch(hop + ahead);
    for (std::size_t s = 0; s < count && hop + 1 < members; ++s) {
      const auto& [k, v] = now.size() == 1 ? now.front() : now[s];
      me.send(k, strips.leaving(Kind::K, s, hop), right);
      me.send(v, strips.leaving(Kind::V, s, hop), right);
    }
    for (const auto& [k, v] : now) me.attend(q, k, v, out);
    if (hop == 0 && meanwhile) meanwhile();
    if (next.empty()) break;
    now = std::move(next.front());
    next.pop_front();
  }
}

void redistribute(Writer& me, const std::vector<int>& group, const std::vector<Block>& from,
                  const std::vector<Block>& to, SlotId source, SlotId target) {
  const std::size_t members = group.size();
  const auto here = static_cast<std::size_t>(place_in(group, me.rank()));
  Couriers couriers(me.problem(), group, from, to);
  // Where a slot is read it must be whole, so what is passed on has one of its own.
  std::map<std::size_t, SlotId> fetched;  // for others too, by owner
  // Everybody starts with another peer, so that no rank is everybody's first.
  for (std::size_t i = 0; i < members; ++i) {
    const std::size_t other = (here + members - i) % members;
    const Block& block = couriers.straight(other, here);
    const bool passes_on = couriers.stands_for_others(other, here);
    me.recv(passes_on ? fetched[other] = me.slot(block) : target, block, group[other]);
  }
  for (std::size_t owner = 0; owner < members; ++owner) {
    for (const auto& hop : couriers.hops(owner, here)) {
      if (hop.member == here) me.recv(target, hop.block, group[hop.courier]);
    }
    if (fetched.contains(owner)) me.recv(target, couriers.straight(owner, here), me.rank());
  }
  for (std::size_t i = 0; i < members; ++i) {
    const std::size_t other = (here + i) % members;
    me.send(source, couriers.straight(here, other), group[other]);
  }
  for (const auto& [owner, slot] : fetched) {
    for (const auto& hop : couriers.hops(owner, here)) {
      if (hop.courier == here) me.send(slot, hop.block, group[hop.member]);
    }
    me.send(slot, me.block(slot), me.rank());
  }
}

}  // namespace dattn
