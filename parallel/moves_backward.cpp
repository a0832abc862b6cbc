// The backward passes of the moves: inputs move as they do forward, and sums of gradients follow.
#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <numeric>
#include <span>
#include <utility>

#include "parallel/couriers.hpp"
#include "parallel/moves.hpp"
#include "parallel/pull.hpp"

namespace dattn {
namespace {

/// A sum that is rounded at every hop would lose more the more ranks there are. So what a member
/// gives goes straight to the owner, rounded once, as many bytes.
bool sums_go_straight(const Side& side, const Problem& problem) {
  return is_rounded(side.sums.front(), problem);
}

/// Whether some heads go around packed.
bool packs(const Problem& problem) {
  for (std::size_t g = 0; g < problem.head_groups().size(); ++g) {
    if (problem.is_sparse(g)) return true;
  }
  return false;
}

/// For people: which side moves, since the other would be more bytes.
std::string chosen(const std::string& how, Index by_keys, Index by_queries,
                   const std::string& whose) {
  const std::string keys = "K, V, dK, dV";
  const std::string queries = "Q, dO, Stats, dQ";
  const bool fewer = by_queries < by_keys;
  return (fewer ? queries : keys) + " " + how + ", " +
         std::to_string(std::min(by_keys, by_queries)) + " bytes " + whose + "; " +
         (fewer ? keys : queries) + " would be " + std::to_string(std::max(by_keys, by_queries));
}

}  // namespace

Side lighter_side(Writer& me, const std::vector<int>& ranks, const Held& held) {
  const Problem& problem = me.problem();
  if (packs(problem)) {
    const auto [keys, queries] = problem.backward_fetched();
    me.note(chosen("go around as far as they are needed", keys, queries,
                   "if each rank fetched its own") +
            "; their sums go straight to their owners");
    return queries < keys ? query_side(Pass::backward) : key_side(Pass::backward);
  }
  const auto bytes = [&](const Side& side) {
    Index sum = 0;
    for (const auto kinds : {side.inputs, side.sums}) {
      for (const Kind kind : kinds) {
        for (const int rank : ranks) {
          sum += wire_bytes(held(kind, rank), problem);
        }
      }
    }
    return sum;
  };
  const Side keys = key_side(Pass::backward);
  const Side queries = query_side(Pass::backward);
  const Index by_keys = bytes(keys);
  const Index by_queries = bytes(queries);
  std::string why = chosen("go around", by_keys, by_queries, "a hop of all");
  const Side side = by_queries < by_keys ? queries : keys;
  if (sums_go_straight(side, problem)) why += "; rounded sums go straight to their owners";
  me.note(why);
  return side;
}

namespace {

/// The head with as many before it as behind it, or one more behind. Any, if there are none.
Index middle_of(const Ranges& heads) {
  Index left = size(heads) / 2;
  for (const Range r : heads) {
    if (left < r.size()) return r.begin + left;
    left -= r.size();
  }
  return 0;
}

/// Two halves of a rank's own keys and values: between heads, where each query head reads from one
/// half only, else between rows. Nothing if there are not two.
struct Half {
  Block k, v;
};
std::vector<Half> halves(const Shape& shape, const Block& q, const Block& k, const Block& v) {
  const auto heads_of_q = [&](const Ranges& heads) {
    return Half{{Kind::K, heads_touched(Kind::K, heads, shape), k.rows},
                {Kind::V, heads_touched(Kind::V, heads, shape), v.rows}};
  };
  const Index unit =
      std::lcm(shape.query_heads / shape.key_heads, shape.query_heads / shape.value_heads);
  const Index cut = middle_of(q.heads) / unit * unit;
  const Ranges before = intersect(q.heads, Ranges{{0, cut}});
  const Ranges after = intersect(q.heads, Ranges{{cut, shape.query_heads}});
  if (!before.empty() && !after.empty()) return {heads_of_q(before), heads_of_q(after)};
  std::vector<Half> rows;
  Index left = k.row_count() / 2;
  if (left == 0) return rows;
  Ranges first, second;
  for (const Range range : k.rows) {
    const Index middle = range.begin + std::min(left, range.size());
    append(first, {range.begin, middle});
    append(second, {middle, range.end});
    left -= middle - range.begin;
  }
  for (const Ranges& part : {first, second}) {
    rows.push_back({{Kind::K, k.heads, part}, {Kind::V, v.heads, part}});
  }
  return rows;
}

/// The work on a rank's own keys in two halves, one for each time that nothing but it can hide
/// messages: while the first guest is on its way, and while the own sums come home.
class OwnWork {
 public:
  OwnWork(Writer& me, const AttendBackward& mine)
      : me_(me),
        mine_(mine),
        halves_(
            halves(me.problem().shape(), me.block(mine.q), me.block(mine.k), me.block(mine.v))) {
    if (halves_.empty()) return;
    for (int& home : homes_) home = me.home();
  }

  void first() { halves_.empty() ? me_.attend_backward(mine_) : work_on(halves_[0]); }
  void second() {
    if (!halves_.empty()) work_on(halves_[1]);
  }

 private:
  /// A step takes whole slots, so the half is copied: a message of the rank to itself.
  void work_on(const Half& half) {
    AttendBackward part = mine_;
    part.k = me_.slot(half.k, homes_[0]);
    part.v = me_.slot(half.v, homes_[1]);
    if (!me_.sees(mine_.q, part.k)) return;
    for (const auto& [to, from] : {std::pair{part.k, mine_.k}, std::pair{part.v, mine_.v}}) {
      me_.recv(to, me_.block(to), me_.rank());
      me_.send(from, me_.block(to), me_.rank());
    }
    part.dk = me_.fresh({Kind::dK, half.k.heads, half.k.rows}, homes_[2]);
    part.dv = me_.fresh({Kind::dV, half.v.heads, half.v.rows}, homes_[3]);
    me_.attend_backward(part);
    me_.add(part.dk, mine_.dk);
    me_.add(part.dv, mine_.dv);
  }

  Writer& me_;
  const AttendBackward& mine_;
  std::vector<Half> halves_;
  std::array<int, 4> homes_{};  ///< of a half's K, V, dK, dV
};

}  // namespace

void circulate_backward(Writer& me, const std::vector<int>& ring, const AttendBackward& mine,
                        const Held& held, const std::function<void()>& meanwhile,
                        const StandsFor& stands_for) {
  if (ring.size() == 1) {
    me.attend_backward(mine);
    if (meanwhile) meanwhile();
    return;
  }
  RingHomes homes;
  OwnWork own(me, mine);
  const Side side = lighter_side(me, ring, held);
  const Strips strips(me.problem(), ring, me.rank(), of_queries(side.inputs.front()), held,
                      stands_for);
  circulate_backward(
      me, strips, side, {mine}, homes,
      [&](const StripSlots& now) {
        const bool is_own = now.front().q == mine.q && now.front().k == mine.k;
        if (is_own) {
          own.first();
          if (meanwhile) meanwhile();
          return;
        }
        for (const AttendBackward& slots : now) me.attend_backward(slots);
      },
      [&] { own.second(); });
}

void circulate_backward(Writer& me, const Strips& strips, const Side& side, const StripSlots& mine,
                        RingHomes& ring_homes, const std::function<void(const StripSlots&)>& visit,
                        const std::function<void()>& at_last) {
  const int members = strips.members();
  const std::size_t count = strips.count();
  const int right = strips.member(1);
  const int left = strips.member(-1);
  if (members == 1) return visit(mine);
  // Of a packed strip members need different rows: a sum that went round would have those of all
  // of them.
  const bool rounded = sums_go_straight(side, me.problem());
  const auto straight = [&](std::size_t s) { return rounded || strips.packed(s); };
  auto& homes = ring_homes.strips;
  if (homes.empty()) {
    homes.resize(count);
    for (RingHomes::OfStrip& strip : homes) {
      for (const auto kinds : {side.inputs, side.sums}) {
        for (const Kind kind : kinds) {
          for (AttendBackward& h : strip.turns) operand(h, kind) = me.home();
        }
      }
      for (const Kind kind : side.sums) operand(strip.arrival, kind) = me.home();
    }
  }
  // At hop h a member works on what the member h places to its left started with. The sum of a
  // shard's gradients begins at its first guest, at hop 1, and follows the shard until it is home;
  // what the owner itself gives stays there. What was computed at hop h - 1 arrives at hop h.
  const auto arrive = [&](int hop) {
    StripSlots arrived(count);
    for (std::size_t s = 0; s < count; ++s) {
      for (const Kind kind : side.sums) {
        const Block block = straight(s)     ? strips.needed_of_own(kind, s, hop - 1)
                            : hop < members ? strips.arriving(kind, s, hop)
                                            : strips.leaving(kind, s, 0);
        operand(arrived[s], kind) = me.slot(block, operand(homes[s].arrival, kind));
        me.recv(operand(arrived[s], kind), block, straight(s) ? strips.member(hop - 1) : left);
      }
    }
    return arrived;
  };
  StripSlots own = mine;
  own.resize(count, mine.front());
  StripSlots now = own;
  for (int hop = 0; hop < members; ++hop) {
    StripSlots arrived(count);
    if (hop >= 2) arrived = arrive(hop);
    StripSlots next = own;
    for (std::size_t s = 0; s < count && hop + 1 < members; ++s) {
      AttendBackward& home = homes[s].turns[static_cast<std::size_t>(hop % 2)];
      for (const Kind kind : side.inputs) {
        operand(next[s], kind) = me.slot(strips.arriving(kind, s, hop + 1), operand(home, kind));
        me.recv(operand(next[s], kind), me.block(operand(next[s], kind)), left);
      }
      for (const Kind kind : side.inputs) {
        me.send(operand(now[s], kind), strips.leaving(kind, s, hop), right);
      }
    }
    for (std::size_t s = 0; s < count && hop >= 1; ++s) {
      AttendBackward& home = homes[s].turns[static_cast<std::size_t>(hop % 2)];
      for (const Kind kind : side.sums) {
        // What only passes through gives nothing to anyone here.
        const bool passes = strips.packed(s) && strips.needed(kind, s, hop).empty();
        operand(now[s], kind) =
            me.fresh(passes ? Block{kind, Ranges{}, Ranges{}} : strips.arriving(kind, s, hop),
                     operand(home, kind));
      }
    }
    visit(hop == 0 ? mine : now);
    for (std::size_t s = 0; s < count && hop >= 1; ++s) {
      for (const Kind kind : side.sums) {
        if (hop >= 2 && !straight(s)) me.add(operand(arrived[s], kind), operand(now[s], kind));
        if (straight(s)) {
          me.send(operand(now[s], kind), strips.needed(kind, s, hop), strips.member(-hop));
        } else {
          me.send(operand(now[s], kind), me.block(operand(now[s], kind)), right);
        }
        if (hop >= 2 && straight(s)) me.add(operand(arrived[s], kind), operand(own[s], kind));
      }
    }
    now = std::move(next);
  }
  const StripSlots home = arrive(members);
  if (at_last) at_last();
  for (std::size_t s = 0; s < count; ++s) {
    for (AttendBackward sums = home[s]; const Kind kind : side.sums) {
      me.add(operand(sums, kind), operand(own[s], kind));
    }
  }
}

void collect(Writer& me, const std::vector<int>& group, const std::vector<Block>& from,
             const std::vector<Block>& to, SlotId source, SlotId target) {
  const std::size_t members = group.size();
  const auto here = static_cast<std::size_t>(place_in(group, me.rank()));
  Couriers couriers(me.problem(), group, to, from);
  std::vector<int> homes;  // one fills while the other is added
  /// Receives pieces and adds them to `sum`.
  const auto add_up = [&](const std::vector<std::pair<Block, int>>& pieces, SlotId sum) {
    while (homes.size() < std::min<std::size_t>(pieces.size(), 2)) homes.push_back(me.home());
    std::vector<SlotId> arrived;
    for (std::size_t n = 0; n <= pieces.size(); ++n) {
      if (n < pieces.size()) {
        const auto& [piece, peer] = pieces[n];
        arrived.push_back(me.slot(piece, homes[n % 2]));
        me.recv(arrived.back(), piece, peer);
      }
      if (n > 0) me.add(arrived[n - 1], sum);
    }
  };
  // What a host has for an owner elsewhere its courier sums up first. Between two ranks of a host
  // these messages come before those for each other.
  for (std::size_t owner = 0; owner < members; ++owner) {
    for (const auto& hop : couriers.hops(owner, here)) {
      if (hop.member == here) me.send(source, hop.block, group[hop.courier]);
    }
  }
  std::map<std::size_t, SlotId> summed;  // for others too, by owner
  for (std::size_t owner = 0; owner < members; ++owner) {
    if (!couriers.stands_for_others(owner, here)) continue;
    const SlotId sum = summed[owner] = me.slot(couriers.straight(owner, here));
    me.recv(sum, me.block(sum), me.rank());
    me.send(source, me.block(sum), me.rank());
    std::vector<std::pair<Block, int>> pieces;
    for (const auto& hop : couriers.hops(owner, here)) {
      if (hop.courier == here) pieces.emplace_back(hop.block, group[hop.member]);
    }
    add_up(pieces, sum);
  }
  // What nobody before has something for is received in its place; the rest is added up.
  std::vector<Block> alone;
  std::vector<std::pair<Block, int>> added;
  for (std::size_t i = 0; i < members; ++i) {
    const Block& piece = couriers.straight(here, i);
    if (piece.empty()) continue;
    if (std::any_of(alone.begin(), alone.end(),
                    [&](const Block& other) { return !intersect(piece, other).empty(); })) {
      added.emplace_back(piece, group[i]);
    } else {
      alone.push_back(piece);
      me.recv(target, piece, group[i]);
    }
  }
  for (std::size_t i = 0; i < members; ++i) {  // everybody starts with another peer
    const std::size_t other = (here + i) % members;
    const auto found = summed.find(other);
    me.send(found != summed.end() ? found->second : source, couriers.straight(other, here),
            group[other]);
  }
  add_up(added, target);
}

void pull_backward(Writer& me, AttendBackward mine) {
  const Problem& problem = me.problem();
  const auto [by_keys, by_queries] = problem.backward_fetched();
  const Side side = by_queries < by_keys ? query_side(Pass::backward) : key_side(Pass::backward);
  if (problem.ranks() > 1) me.note(chosen("are fetched", by_keys, by_queries, "of all"));
  pull_side(me, Pass::backward, side, mine, {});
}

}  // namespace dattn
