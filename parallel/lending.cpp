#include "parallel/lending.hpp"

#include <algorithm>
#include <type_traits>

namespace dattn {
namespace {

/// Calls f(slot, step) for every slot that a step of the Program writes to.
template <class F>
void each_write(const Program& program, const F& f) {
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    const auto writes = [&](SlotId s) { f(s, static_cast<int>(i)); };
    std::visit(
        [&]<class S>(const S& step) {
          if constexpr (std::is_same_v<S, Recv> || std::is_same_v<S, Reduce> ||
                        std::is_same_v<S, Clear>) {
            writes(step.slot);
          } else if constexpr (std::is_same_v<S, Attend>) {
            writes(step.out);
          } else if constexpr (std::is_same_v<S, AttendBackward>) {
            for (const SlotId s : {step.dq, step.dk, step.dv}) writes(s);
          } else if constexpr (std::is_same_v<S, Merge> || std::is_same_v<S, Add>) {
            writes(step.into);
          } else {
            static_assert(std::is_same_v<S, Send>);
          }
        },
        program.steps[i]);
  }
}

}  // namespace

std::vector<bool> borrowable_slots(const Program& program) {
  std::vector<bool> may(program.slots.size(), true);
  const auto not_this = [&](SlotId s) { may[static_cast<std::size_t>(s)] = false; };
  for (const SlotId s : program.inputs) not_this(s);
  for (const SlotId s : program.kept) not_this(s);
  for (const Result& result : program.results) not_this(result.slot);
  each_write(program, [&](SlotId s, int i) {
    const auto* recv = std::get_if<Recv>(&program.steps[static_cast<std::size_t>(i)]);
    const Block& whole = program.slots[static_cast<std::size_t>(s)].block;
    if (recv == nullptr || recv->block != whole) not_this(s);
  });
  return may;
}

std::vector<int> last_writes(const Program& program, const Problem& problem) {
  std::vector<int> last(static_cast<std::size_t>(program.homes), -1);
  const auto home = [&](SlotId s) -> int& {
    return last[static_cast<std::size_t>(program.slots[static_cast<std::size_t>(s)].home)];
  };
  each_write(program, [&](SlotId s, int i) { home(s) = std::max(home(s), i); });
  if (problem.compensate() != Compensate::off) {
    for (const Result& result : program.results) {
      home(result.slot) = static_cast<int>(program.steps.size());
    }
  }
  return last;
}

std::vector<bool> homes_seen(const Program& program, const std::function<bool(int rank)>& sees) {
  std::vector<bool> seen(static_cast<std::size_t>(program.homes), false);
  const auto mark = [&](SlotId s) {
    seen[static_cast<std::size_t>(program.slots[static_cast<std::size_t>(s)].home)] = true;
  };
  for (const Step& step : program.steps) {
    const auto* send = std::get_if<Send>(&step);
    // What the rank sends to itself may be looked at from there on.
    if (send != nullptr && (send->peer == program.rank || sees(send->peer))) mark(send->slot);
  }
  for (const SlotId s : program.kept) mark(s);
  return seen;
}

}  // namespace dattn
