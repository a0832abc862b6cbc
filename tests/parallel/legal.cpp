#include "tests/parallel/legal.hpp"

namespace dattn {
namespace {

struct Broken {
  const char* what;
};

void need(bool holds, const char* what) {
  if (!holds) throw Broken{what};
}

void check(const Problem& problem, const Program& p) {
  const auto known = [&](SlotId s) {
    need(s >= 0 && s < static_cast<SlotId>(p.slots.size()), "slot");
  };
  const auto kind = [&](SlotId s, Kind k) {
    known(s);
    need(p.slots[static_cast<std::size_t>(s)].block.kind == k, "kind");
  };
  for (const Slot& s : p.slots) {
    const bool q = s.block.kind == Kind::Q || s.block.kind == Kind::O;
    need(s.home >= 0 && s.home < p.homes, "home");
    const Range heads{0, heads_of(s.block.kind, problem.shape())};
    need(s.block.heads.size() >= 0 && heads.contains(s.block.heads), "heads");
    for (const Range r : s.block.rows) {
      need(r.begin >= 0 && r.size() >= 0 &&
               r.end <= (q ? problem.shape().queries : problem.shape().keys),
           "rows");
    }
  }
  kind(p.q, Kind::Q);
  kind(p.k, Kind::K);
  kind(p.v, Kind::V);
  kind(p.out, Kind::O);
  const auto written = [&](SlotId s) {
    for (const SlotId in : {p.q, p.k, p.v}) {
      need(p.slots[static_cast<std::size_t>(s)].home != p.slots[static_cast<std::size_t>(in)].home,
           "write to an input");
    }
  };
  const auto message = [&](SlotId s, const Block& b, int peer) {
    known(s);
    need(peer >= 0 && peer < problem.ranks(), "peer");
    need(contains(p.slots[static_cast<std::size_t>(s)].block, b), "part");
  };
  for (const Step& step : p.steps) {
    if (const auto* send = std::get_if<Send>(&step)) {
      message(send->slot, send->block, send->peer);
    } else if (const auto* recv = std::get_if<Recv>(&step)) {
      message(recv->slot, recv->block, recv->peer);
      written(recv->slot);
    } else if (const auto* a = std::get_if<Attend>(&step)) {
      kind(a->q, Kind::Q);
      kind(a->k, Kind::K);
      kind(a->v, Kind::V);
      kind(a->out, Kind::O);
      const auto at = [&](SlotId s) { return p.slots[static_cast<std::size_t>(s)].block; };
      need(at(a->q).rows == at(a->out).rows && at(a->q).heads == at(a->out).heads &&
               at(a->k).rows == at(a->v).rows,
           "operands");
      written(a->out);
    } else if (const auto* m = std::get_if<Merge>(&step)) {
      kind(m->from, Kind::O);
      kind(m->into, Kind::O);
      need(contains(p.slots[static_cast<std::size_t>(m->into)].block,
                    p.slots[static_cast<std::size_t>(m->from)].block),
           "merge");
      written(m->into);
    } else if (const auto* d = std::get_if<Reduce>(&step)) {
      kind(d->slot, Kind::O);
      need(d->axis >= 0 && d->axis < static_cast<int>(problem.mesh().axes.size()), "axis");
      written(d->slot);
    }
  }
  need(p.delivers.kind == Kind::O &&
           contains(p.slots[static_cast<std::size_t>(p.out)].block, p.delivers),
       "result");
}

}  // namespace

const char* illegal(const Problem& problem, const Program& program, int rank) {
  try {
    need(program.rank == rank, "rank");
    check(problem, program);
  } catch (const Broken& broken) {
    return broken.what;
  }
  return nullptr;
}

}  // namespace dattn
