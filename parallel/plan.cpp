#include "parallel/plan.hpp"

#include <algorithm>

namespace dattn {

std::vector<Index> home_bytes(const Program& program, const Problem& problem) {
  std::vector<Index> bytes(static_cast<std::size_t>(program.homes), 0);
  for (const Slot& slot : program.slots) {
    Index& home = bytes[static_cast<std::size_t>(slot.home)];
    home = std::max(home, bytes_of(slot.block, problem.shape(), problem.type()));
  }
  return bytes;
}

Index wire_bytes(const Program& program, const Send& send, const Problem& problem) {
  if (send.peer == program.rank) return 0;
  return bytes_of(send.block, problem.shape(), problem.type());
}

Index reduce_bytes(Index records, Index record_bytes, Index ranks, Index rank) {
  const Index own = even_part(records, ranks, rank).size();
  const Index next = even_part(records, ranks, (rank + 1) % ranks).size();
  return (2 * records - own - next) * record_bytes;
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
  std::string operator()(const Merge& s) const {
    return "merge  " + slot_text(program, s.from) + " into " + slot_text(program, s.into);
  }
  std::string operator()(const Reduce& s) const {
    return "reduce " + slot_text(program, s.slot) + " along axis " + std::to_string(s.axis);
  }
};

}  // namespace

std::string text(const Program& program, const Step& step) {
  return std::visit(Describe{program}, step);
}

std::string text(const Program& program) {
  std::string out = "rank " + std::to_string(program.rank) + "\n";
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    const std::string number = std::to_string(i);
    out += std::string(number.size() < 4 ? 4 - number.size() : 0, ' ') + number + "  " +
           text(program, program.steps[i]) + "\n";
  }
  return out + "  delivers " + text(program.delivers) + "\n";
}

}  // namespace dattn
