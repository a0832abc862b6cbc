#include "parallel/plan.hpp"

#include <algorithm>
#include <array>
#include <numeric>

#include "kernels/check.hpp"
#include "parallel/pseudo_keys.hpp"

namespace dattn {

SlotId& operand(AttendBackward& step, Kind kind) {
  switch (kind) {
    case Kind::Q:
      return step.q;
    case Kind::K:
      return step.k;
    case Kind::V:
      return step.v;
    case Kind::dO:
      return step.d_o;
    case Kind::Stats:
      return step.stats;
    case Kind::dQ:
      return step.dq;
    case Kind::dK:
      return step.dk;
    case Kind::dV:
      return step.dv;
    case Kind::O:
      break;
  }
  check_failed("kind != Kind::O", __FILE__, __LINE__, "");
}

SlotId Program::input(Kind kind) const {
  const auto found = std::find_if(inputs.begin(), inputs.end(), [&](SlotId s) {
    return slots[static_cast<std::size_t>(s)].block.kind == kind;
  });
  CHECK(found != inputs.end(), name_of(kind));
  return *found;
}

const Result& Program::result(Kind kind) const {
  const auto found = std::find_if(results.begin(), results.end(),
                                  [&](const Result& r) { return r.block.kind == kind; });
  CHECK(found != results.end(), name_of(kind));
  return *found;
}

std::vector<Index> home_bytes(const Program& program, const Problem& problem) {
  std::vector<Index> bytes(static_cast<std::size_t>(program.homes), 0);
  for (const Slot& slot : program.slots) {
    Index& home = bytes[static_cast<std::size_t>(slot.home)];
    home = std::max(home, bytes_of(slot.block, problem.shape(), problem.type()));
  }
  return bytes;
}

bool is_rounded(Kind kind, const Problem& problem) {
  return problem.wire() == Wire::bf16 && is_sum(kind);
}

std::vector<Index> staging_bytes(const Program& program, const Problem& problem) {
  std::vector<Index> sent(program.slots.size(), 0);
  std::vector<Index> received = sent;
  const auto add = [&](const auto& message, std::vector<Index>& to) {
    if (message.peer == program.rank || !is_rounded(message.block.kind, problem)) return;
    to[static_cast<std::size_t>(message.slot)] += wire_bytes(message.block, problem);
  };
  for (const Step& step : program.steps) {
    if (const auto* send = std::get_if<Send>(&step)) add(*send, sent);
    if (const auto* recv = std::get_if<Recv>(&step)) add(*recv, received);
  }
  std::vector<Index> bytes(static_cast<std::size_t>(program.homes), 0);
  for (std::size_t s = 0; s < program.slots.size(); ++s) {
    Index& home = bytes[static_cast<std::size_t>(program.slots[s].home)];
    home = std::max({home, sent[s], received[s]});
  }
  return bytes;
}

Index wire_bytes(const Block& block, const Problem& problem) {
  const Index records = block.row_count() * block.head_count();
  const Index record = record_bytes(block.kind, problem.shape(), problem.type());
  if (!is_rounded(block.kind, problem)) return records * record;
  const Index kept = block.kind == Kind::O ? 2 * sum_bytes_of(problem.type()) : 0;
  return records * (kept + (record - kept) / 2);
}

Index memory_bytes(const Program& program, const Problem& problem) {
  Index sum = 0;
  for (const auto& bytes : {home_bytes(program, problem), staging_bytes(program, problem)}) {
    sum = std::accumulate(bytes.begin(), bytes.end(), sum);
  }
  return sum + reduce_bytes(program, problem) + pseudo_key_cost(problem, program.rank).memory_bytes;
}

Index kept_bytes(const Program& program, const Problem& problem) {
  Index sum = 0;
  for (const SlotId s : program.kept) {
    sum +=
        bytes_of(program.slots[static_cast<std::size_t>(s)].block, problem.shape(), problem.type());
  }
  return sum;
}

Index wire_bytes(const Program& program, const Send& send, const Problem& problem) {
  return send.peer == program.rank ? 0 : wire_bytes(send.block, problem);
}

Reduction reduction(const Program& program, const Reduce& step, const Problem& problem) {
  const Block& block = program.slots[static_cast<std::size_t>(step.slot)].block;
  return Reduction(problem.mesh().group(program.rank, step.axis), problem.hosts(),
                   block.row_count() * block.head_count());
}

Index record_bytes(const Program& program, const Reduce& step, const Problem& problem) {
  const Kind kind = program.slots[static_cast<std::size_t>(step.slot)].block.kind;
  return record_bytes(kind, problem.shape(), problem.type());
}

Index reduce_bytes(const Program& program, const Problem& problem) {
  Index most = 0;
  for (const Step& step : program.steps) {
    const auto* reduce = std::get_if<Reduce>(&step);
    if (reduce == nullptr) continue;
    const int here = problem.mesh().coordinate(program.rank, reduce->axis);
    most = std::max(most, reduction(program, *reduce, problem).scratch(here) *
                              record_bytes(program, *reduce, problem));
  }
  return most;
}

namespace {

std::string slot_text(const Program& program, SlotId id) {
  const Slot& slot = program.slots[static_cast<std::size_t>(id)];
  return text(slot.block) + "@" + std::to_string(slot.home);
}

struct Describe {
  const Program& program;

  std::string operator()(const Send& s) const {
    return "send   " + text(s.block) + " to " + std::to_string(s.peer);
  }
  std::string operator()(const Recv& s) const {
    return "recv   " + text(s.block) + " from " + std::to_string(s.peer) + " into home " +
           std::to_string(program.slots[static_cast<std::size_t>(s.slot)].home);
  }
  std::string operator()(const Attend& s) const {
    return "attend " + slot_text(program, s.q) + " to " + slot_text(program, s.k) + " " +
           slot_text(program, s.v) + " merged into home " +
           std::to_string(program.slots[static_cast<std::size_t>(s.out)].home);
  }
  std::string operator()(const AttendBackward& s) const {
    return "back   " + slot_text(program, s.q) + " " + slot_text(program, s.d_o) + " " +
           slot_text(program, s.stats) + " with " + slot_text(program, s.k) + " " +
           slot_text(program, s.v) + " added to " + slot_text(program, s.dq) + " " +
           slot_text(program, s.dk) + " " + slot_text(program, s.dv);
  }
  std::string operator()(const Merge& s) const {
    return "merge  " + slot_text(program, s.from) + " into " + slot_text(program, s.into);
  }
  std::string operator()(const Add& s) const {
    return "add    " + slot_text(program, s.from) + " to " + slot_text(program, s.into);
  }
  std::string operator()(const Clear& s) const { return "clear  " + slot_text(program, s.slot); }
  std::string operator()(const Reduce& s) const {
    return "reduce " + slot_text(program, s.slot) + " along axis " + std::to_string(s.axis);
  }
};

}  // namespace

std::string text(const Program& program, const Step& step) {
  return std::visit(Describe{program}, step);
}

std::string text(const Program& program) {
  std::string out = "rank " + std::to_string(program.rank) +
                    (program.note.empty() ? "" : ": " + program.note) + "\n";
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    const std::string number = std::to_string(i);
    out += std::string(number.size() < 4 ? 4 - number.size() : 0, ' ') + number + "  " +
           text(program, program.steps[i]) + "\n";
  }
  for (const Result& result : program.results) out += "  delivers " + text(result.block) + "\n";
  for (const SlotId s : program.kept) out += "  keeps " + slot_text(program, s) + "\n";
  return out;
}

}  // namespace dattn
