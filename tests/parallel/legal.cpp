#include "tests/parallel/legal.hpp"

#include <algorithm>

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
    const bool q = s.block.kind != Kind::K && s.block.kind != Kind::V && s.block.kind != Kind::dK &&
                   s.block.kind != Kind::dV;
    need(s.home >= 0 && s.home < p.homes, "home");
    for (std::size_t i = 0; i < s.block.heads.size(); ++i) {
      const Range heads = s.block.heads[i];
      need(heads.begin >= 0 && heads.size() > 0 &&
               heads.end <= heads_of(s.block.kind, problem.shape()) &&
               (i == 0 || heads.begin > s.block.heads[i - 1].end),
           "heads");
    }
    for (const Range r : s.block.rows) {
      need(r.begin >= 0 && r.size() >= 0 &&
               r.end <= (q ? problem.shape().queries : problem.shape().keys),
           "rows");
    }
  }
  const bool forward = p.pass == Pass::forward;
  const std::vector<Kind> in_kinds =
      forward ? std::vector{Kind::Q, Kind::K, Kind::V}
              : std::vector{Kind::Q, Kind::K, Kind::V, Kind::dO, Kind::Stats};
  const std::vector<Kind> out_kinds =
      forward ? std::vector{Kind::O} : std::vector{Kind::dQ, Kind::dK, Kind::dV};
  need(p.inputs.size() == in_kinds.size() && p.results.size() == out_kinds.size(), "pass");
  for (std::size_t i = 0; i < in_kinds.size(); ++i) kind(p.inputs[i], in_kinds[i]);
  for (std::size_t i = 0; i < out_kinds.size(); ++i) kind(p.results[i].slot, out_kinds[i]);
  std::vector<Kind> kept;
  for (const SlotId s : p.kept) {
    known(s);
    const Kind k = p.slots[static_cast<std::size_t>(s)].block.kind;
    need(forward && k <= Kind::V && std::find(kept.begin(), kept.end(), k) == kept.end(), "kept");
    kept.push_back(k);
  }
  const auto sum = [](Kind k) { return k >= Kind::dQ || k == Kind::O; };
  const auto written = [&](SlotId s) {
    for (const SlotId in : p.inputs) {
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
    } else if (const auto* b = std::get_if<AttendBackward>(&step)) {
      kind(b->q, Kind::Q);
      kind(b->k, Kind::K);
      kind(b->v, Kind::V);
      kind(b->d_o, Kind::dO);
      kind(b->stats, Kind::Stats);
      kind(b->dq, Kind::dQ);
      kind(b->dk, Kind::dK);
      kind(b->dv, Kind::dV);
      const auto same = [&](SlotId x, SlotId y) {
        const Block& one = p.slots[static_cast<std::size_t>(x)].block;
        const Block& other = p.slots[static_cast<std::size_t>(y)].block;
        need(one.rows == other.rows && (x == b->k || one.heads == other.heads), "operands");
      };
      same(b->q, b->d_o);
      same(b->q, b->stats);
      same(b->q, b->dq);
      same(b->k, b->v);
      same(b->v, b->dv);
      need(p.slots[static_cast<std::size_t>(b->k)].block.heads ==
                   p.slots[static_cast<std::size_t>(b->dk)].block.heads &&
               p.slots[static_cast<std::size_t>(b->k)].block.rows ==
                   p.slots[static_cast<std::size_t>(b->dk)].block.rows,
           "operands");
      for (const SlotId s : {b->dq, b->dk, b->dv}) written(s);
    } else if (const auto* plus = std::get_if<Add>(&step)) {
      known(plus->from);
      known(plus->into);
      const Slot& from = p.slots[static_cast<std::size_t>(plus->from)];
      const Slot& into = p.slots[static_cast<std::size_t>(plus->into)];
      need(sum(from.block.kind) && from.block.kind != Kind::O && from.home != into.home &&
               contains(into.block, from.block),
           "add");
      written(plus->into);
    } else if (const auto* zero = std::get_if<Clear>(&step)) {
      known(zero->slot);
      need(sum(p.slots[static_cast<std::size_t>(zero->slot)].block.kind), "clear");
      written(zero->slot);
    } else if (const auto* m = std::get_if<Merge>(&step)) {
      kind(m->from, Kind::O);
      kind(m->into, Kind::O);
      need(contains(p.slots[static_cast<std::size_t>(m->into)].block,
                    p.slots[static_cast<std::size_t>(m->from)].block),
           "merge");
      written(m->into);
    } else if (const auto* d = std::get_if<Reduce>(&step)) {
      known(d->slot);
      need(sum(p.slots[static_cast<std::size_t>(d->slot)].block.kind), "reduce");
      need(d->axis >= 0 && d->axis < static_cast<int>(problem.mesh().axes.size()), "axis");
      written(d->slot);
    }
  }
  for (const Result& r : p.results) {
    need(contains(p.slots[static_cast<std::size_t>(r.slot)].block, r.block), "result");
  }
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
