#include "tests/parallel/mutants.hpp"

#include <utility>

namespace dattn {
namespace {

/// The slots and the Block that a step names, whatever its kind.
std::vector<SlotId*> slots_of(Step& step) {
  if (auto* s = std::get_if<Send>(&step)) return {&s->slot};
  if (auto* s = std::get_if<Recv>(&step)) return {&s->slot};
  if (auto* s = std::get_if<Attend>(&step)) return {&s->q, &s->k, &s->v, &s->out};
  if (auto* s = std::get_if<AttendBackward>(&step)) {
    return {&s->q, &s->k, &s->v, &s->d_o, &s->stats, &s->dq, &s->dk, &s->dv};
  }
  if (auto* s = std::get_if<Merge>(&step)) return {&s->from, &s->into};
  if (auto* s = std::get_if<Add>(&step)) return {&s->from, &s->into};
  if (auto* s = std::get_if<Clear>(&step)) return {&s->slot};
  return {&std::get<Reduce>(step).slot};
}
Block* block_of(Step& step) {
  if (auto* s = std::get_if<Send>(&step)) return &s->block;
  if (auto* s = std::get_if<Recv>(&step)) return &s->block;
  return nullptr;
}

/// The Block with its rows or heads cut at one end or moved by one.
std::vector<Block> bent(const Block& block) {
  std::vector<Block> out;
  for (const auto& [begin, end] : {std::pair{1, 0}, std::pair{0, -1}, std::pair{1, 1},
                                   std::pair{-1, -1}, std::pair{0, 1}, std::pair{-1, 0}}) {
    const auto bend = [&](Ranges& ranges) {
      ranges.front().begin += begin;
      ranges.back().end += end;
      if (ranges.front().empty()) ranges.erase(ranges.begin());
      if (!ranges.empty() && ranges.back().empty()) ranges.pop_back();
    };
    for (Ranges Block::*part : {&Block::heads, &Block::rows}) {
      if ((block.*part).empty()) continue;
      Block other = block;
      bend(other.*part);
      out.push_back(other);
    }
  }
  return out;
}

class Mutants {
 public:
  using Visit = std::function<void(const Plan&, const std::string&)>;
  Mutants(const Plan& plan, const Visit& visit) : plan_(plan), visit_(visit) {}

  void run() {
    for (std::size_t r = 0; r < plan_.size(); ++r) {
      for (std::size_t i = 0; i < plan_[r].steps.size(); ++i) {
        steps(plan_[r].steps, static_cast<std::ptrdiff_t>(i));
        one_step(plan_[r], plan_[r].steps[i]);
      }
      slots(plan_[r]);
      program(plan_[r]);
      for (std::size_t s = r + 1; s < plan_.size(); ++s) {
        for (std::size_t i = 0; i < plan_[r].results.size(); ++i) {
          Block& one = plan_[r].results[i].block;
          Block& other = plan_[s].results[i].block;
          std::swap(one, other);
          visit_(plan_, "exchange delivers");
          std::swap(one, other);
        }
      }
    }
  }

 private:
  template <class T>
  void with(T& place, T value, const char* kind) {
    T before = std::exchange(place, std::move(value));
    visit_(plan_, kind);
    place = std::move(before);
  }

  void steps(std::vector<Step>& all, std::ptrdiff_t i) {
    const Step step = all[static_cast<std::size_t>(i)];
    all.erase(all.begin() + i);
    visit_(plan_, std::holds_alternative<Reduce>(step)  ? "drop a reduce"
                  : std::holds_alternative<Clear>(step) ? "drop a clear"
                                                        : "drop a step");
    all.insert(all.begin() + i, step);
    all.insert(all.begin() + i, step);
    visit_(plan_, "repeat a step");
    all.erase(all.begin() + i);
    if (i + 1 < static_cast<std::ptrdiff_t>(all.size())) {
      std::swap(all[static_cast<std::size_t>(i)], all[static_cast<std::size_t>(i + 1)]);
      visit_(plan_, "swap neighbours");
      std::swap(all[static_cast<std::size_t>(i)], all[static_cast<std::size_t>(i + 1)]);
    }
    all.push_back(step);
    visit_(plan_, "repeat a step at the end");
    all.pop_back();
  }

  void one_step(const Program& program, Step& step) {
    for (SlotId* place : slots_of(step)) {
      const Kind kind = program.slots[static_cast<std::size_t>(*place)].block.kind;
      for (SlotId s = -1; s <= static_cast<SlotId>(program.slots.size()); ++s) {
        const bool exists = s >= 0 && s < static_cast<SlotId>(program.slots.size());
        const bool same = exists && program.slots[static_cast<std::size_t>(s)].block.kind == kind;
        if (s != *place) with(*place, s, same ? "other slot" : "slot of another kind");
      }
    }
    if (auto* a = std::get_if<Attend>(&step)) {
      std::swap(a->k, a->v);
      visit_(plan_, "swap k and v");
      std::swap(a->k, a->v);
    }
    if (Block* block = block_of(step)) {
      for (const Block& b : bent(*block)) with(*block, b, "bend a message");
    }
    if (auto* s = std::get_if<Send>(&step)) peers(s->peer);
    if (auto* s = std::get_if<Recv>(&step)) peers(s->peer);
    if (auto* s = std::get_if<Reduce>(&step)) {
      for (const int axis : {0, 1, 2}) {
        if (axis != s->axis) with(s->axis, axis, "other axis");
      }
    }
  }

  void peers(int& peer) {
    with(peer, peer + 1, "other peer");
    with(peer, peer - 1, "other peer");
  }

  void slots(Program& program) {
    for (Slot& slot : program.slots) {
      for (int home = 0; home <= program.homes; ++home) {
        if (home != slot.home) with(slot.home, home, "other home");
      }
      for (const Block& b : bent(slot.block)) with(slot.block, b, "bend a slot");
    }
  }

  void program(Program& p) {
    std::vector<SlotId*> places;
    for (SlotId& s : p.inputs) places.push_back(&s);
    for (Result& r : p.results) places.push_back(&r.slot);
    for (SlotId* place : places) {
      for (SlotId s = 0; s < static_cast<SlotId>(p.slots.size()); ++s) {
        if (s != *place) with(*place, s, "other input or result");
      }
    }
    for (Result& r : p.results) {
      for (const Block& b : bent(r.block)) with(r.block, b, "bend delivers");
    }
    for (SlotId& kept : p.kept) {
      for (SlotId s = -1; s <= static_cast<SlotId>(p.slots.size()); ++s) {
        if (s != kept) with(kept, s, "other kept");
      }
    }
    with(p.pass, p.pass == Pass::forward ? Pass::backward : Pass::forward, "other pass");
    with(p.rank, p.rank + 1, "other rank");
  }

  Plan plan_;
  const Visit& visit_;
};

}  // namespace

void each_mutant(const Plan& plan,
                 const std::function<void(const Plan&, const std::string&)>& visit) {
  Mutants(plan, visit).run();
}

}  // namespace dattn
