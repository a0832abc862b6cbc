// Double ring attention, as in LoongTrain (Gu et al. 2024) and BurstAttention (Sun et al. 2024):
// while the ring inside a host turns once, each rank's keys travel to the same place in the next
// host, so that a link between hosts has a whole turn for what a single ring moves in one hop.
#include "parallel/strategies/double_ring.hpp"

#include <numeric>

#include "parallel/moves.hpp"

namespace dattn {
namespace {

constexpr int kOuter = 0;
constexpr int kInner = 1;

/// Both rings of a rank. What goes from host to host is what ranks of that host or of one further
/// on need; inside a host it goes around as far as ranks there need it.
class Rings {
 public:
  Rings(const Problem& problem, int rank, bool queries)
      : problem_(problem),
        rank_(rank),
        queries_(queries),
        place_(static_cast<std::size_t>(problem.mesh().coordinate(rank, kInner))) {
    for (const int member : problem.mesh().group(rank, kInner)) {
      outer_.emplace_back(
          problem, problem.mesh().group(member, kOuter), member, queries,
          [&problem](Kind kind, int other) { return owned(problem, kind, other); },
          [&problem](int other) { return problem.mesh().group(other, kInner); });
    }
  }

  int hosts() const { return outer().members(); }
  const Strips& outer() const { return outer_[place_]; }

  /// The ring inside this host, of what has come from the host `turn` places to the left.
  Strips inner(int turn) const {
    const Mesh& mesh = problem_.mesh();
    return {problem_,
            mesh.group(rank_, kInner),
            rank_,
            queries_,
            [this, &mesh, turn](Kind kind, int member, std::size_t strip) {
              if (turn == 0) return owned(problem_, kind, member);
              const auto place = static_cast<std::size_t>(mesh.coordinate(member, kInner));
              return outer_[place].arriving(kind, strip, turn);
            },
            {}};
  }

 private:
  const Problem& problem_;
  int rank_;
  bool queries_;
  std::size_t place_;          ///< in the inner ring
  std::vector<Strips> outer_;  ///< of each member of the inner ring
};

Program program(const Problem& problem, int rank) {
  return by_token(problem, rank, [&](Writer& me, const Inputs& in, SlotId out) {
    const Rings rings(problem, rank, false);
    const Strips& outer = rings.outer();
    std::vector<int> inner_homes;
    std::vector<int> outer_homes;  // of each strip two for K and V: one turns while the other fills
    KeySlots now{{in.k, in.v}};
    for (int turn = 0; turn < rings.hosts(); ++turn) {
      KeySlots next;
      for (std::size_t s = 0; s < outer.count() && turn + 1 < rings.hosts(); ++s) {
        const std::size_t pair = static_cast<std::size_t>(turn % 2) * outer.count() + s;
        while (outer_homes.size() <= 2 * pair + 1) outer_homes.push_back(me.home());
        const auto& [k, v] = next.emplace_back(
            me.slot(outer.arriving(Kind::K, s, turn + 1), outer_homes[2 * pair]),
            me.slot(outer.arriving(Kind::V, s, turn + 1), outer_homes[2 * pair + 1]));
        me.recv(k, me.block(k), outer.member(-1));
        me.recv(v, me.block(v), outer.member(-1));
        const auto& here = now.size() == 1 ? now.front() : now[s];
        me.send(here.first, outer.leaving(Kind::K, s, turn), outer.member(1));
        me.send(here.second, outer.leaving(Kind::V, s, turn), outer.member(1));
      }
      circulate(me, rings.inner(turn), in.q, now, out, inner_homes);
      now = std::move(next);
    }
  });
}

/// The outer rings' visits are rounds of the inner rings: gradients of a shard that has come to
/// this host are summed up around the host, then go on to the next one behind the shard, or home.
Program backward(const Problem& problem, int rank) {
  std::vector<int> all(static_cast<std::size_t>(problem.ranks()));
  std::iota(all.begin(), all.end(), 0);
  return by_token_backward(problem, rank, [&](Writer& me, const AttendBackward& mine) {
    const auto own = [&](Kind kind, int owner) { return owned(problem, kind, owner); };
    const Side side = lighter_side(me, all, own);
    const Rings rings(problem, rank, of_queries(side.inputs.front()));
    RingHomes outer_homes;
    RingHomes inner_homes;
    int turn = 0;
    circulate_backward(me, rings.outer(), side, {mine}, outer_homes, [&](const StripSlots& shard) {
      circulate_backward(me, rings.inner(turn++), side, shard, inner_homes,
                         [&](const StripSlots& now) {
                           for (const AttendBackward& slots : now) me.attend_backward(slots);
                         });
    });
  });
}

std::optional<std::string> refuses(const Problem& problem) {
  if (problem.mesh().axes.size() == 2) return std::nullopt;
  return "takes a mesh of two axes, hosts x ranks of a host, as in --mesh 2x4, not '" +
         problem.mesh().text() + "'";
}

/// As square as the ranks allow, for a single host.
Mesh mesh(int ranks, const Shape&) {
  int inner = 1;
  for (int i = 1; i * i <= ranks; ++i) {
    if (ranks % i == 0) inner = i;
  }
  return {{{"outer", ranks / inner}, {"inner", inner}}};
}

}  // namespace

Strategy double_ring_strategy() {
  return {"double_ring",
          "a ring inside each host turns once for every hop of the rings between hosts",
          "a mesh of two axes, hosts x ranks of a host (default: as they share hosts, else as "
          "square as possible)",
          "outer,inner",
          program,
          backward,
          refuses,
          mesh};
}

}  // namespace dattn
