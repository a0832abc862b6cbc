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

Program program(const Problem& problem, int rank) {
  const Mesh& mesh = problem.mesh();
  const std::vector<int> outer = mesh.group(rank, kOuter);
  const int hosts = static_cast<int>(outer.size());
  const int host = mesh.coordinate(rank, kOuter);
  const auto neighbour = [&](int steps) {
    return outer[static_cast<std::size_t>((host + steps + hosts) % hosts)];
  };
  return by_token(problem, rank, [&](Writer& me, const Inputs& in, SlotId out) {
    SlotId k = in.k;
    SlotId v = in.v;
    std::vector<int> inner_homes;
    std::vector<int> outer_homes[2];  // of K and V: one pair turns while the other fills
    for (int turn = 0; turn < hosts; ++turn) {
      SlotId next_k = k;
      SlotId next_v = v;
      if (turn + 1 < hosts) {
        auto& homes = outer_homes[turn % 2];
        if (homes.empty()) homes = {me.home(), me.home()};
        next_k = me.slot(owned(problem, Kind::K, neighbour(-turn - 1)), homes[0]);
        next_v = me.slot(owned(problem, Kind::V, neighbour(-turn - 1)), homes[1]);
        me.recv(next_k, me.block(next_k), neighbour(-1));
        me.recv(next_v, me.block(next_v), neighbour(-1));
        me.send(k, me.block(k), neighbour(1));
        me.send(v, me.block(v), neighbour(1));
      }
      const auto held = [&](Kind kind, int member) {
        const int source = (host - turn + hosts) % hosts;
        return owned(problem, kind, mesh.group(member, kOuter)[static_cast<std::size_t>(source)]);
      };
      const Strips strips(problem, mesh.group(rank, kInner), rank, false, held, {});
      circulate(me, strips, in.q, k, v, out, inner_homes);
      k = next_k;
      v = next_v;
    }
  });
}

/// The outer rings' visits are rounds of the inner rings: gradients of a shard that has come to
/// this host are summed up around the host, then go on to the next one behind the shard.
Program backward(const Problem& problem, int rank) {
  const Mesh& mesh = problem.mesh();
  const std::vector<int> outer = mesh.group(rank, kOuter);
  const int hosts = static_cast<int>(outer.size());
  std::vector<int> all(static_cast<std::size_t>(problem.ranks()));
  std::iota(all.begin(), all.end(), 0);
  return by_token_backward(problem, rank, [&](Writer& me, const AttendBackward& mine) {
    const auto own = [&](Kind kind, int owner) { return owned(problem, kind, owner); };
    const Side side = lighter_side(me, all, own);
    RingHomes outer_homes;
    RingHomes inner_homes;
    int source = mesh.coordinate(rank, kOuter);  // the host that the shards here are from
    const auto turn = [&](const AttendBackward& shard) {
      const auto held = [&](Kind kind, int member) {
        return own(kind, mesh.group(member, kOuter)[static_cast<std::size_t>(source)]);
      };
      const Strips strips(problem, mesh.group(rank, kInner), rank, of_queries(side.inputs.front()),
                          held, {});
      circulate_backward(me, strips, side, shard, inner_homes,
                         [&](const AttendBackward& now) { me.attend_backward(now); });
      source = (source + hosts - 1) % hosts;
    };
    circulate_backward(me, Strips::whole(problem, outer, rank, own), side, mine, outer_homes, turn);
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
