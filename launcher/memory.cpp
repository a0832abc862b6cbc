#include "launcher/memory.hpp"

#include <algorithm>

#include "kernels/attend_backward.hpp"
#include "parallel/pairs.hpp"

namespace dattn {

const Kernel& chosen_kernel(Type type) {
  return type == Type::bf16 ? *chosen_isa().bf16 : *chosen_isa().f4;
}

Index kernel_bytes(const Problem& problem, const Program& program, int threads) {
  Index most = 0;
  if (problem.type() == Type::f8) return most;
  const Kernel& kernel = chosen_kernel(problem.type());
  const auto block = [&](SlotId id) -> const Block& {
    return program.slots[static_cast<std::size_t>(id)].block;
  };
  for (const Step& step : program.steps) {
    if (const auto* attend = std::get_if<Attend>(&step)) {
      most = std::max(most, attend_bytes(problem.shape(), block(attend->q).row_count(),
                                         size(heads_served(program, *attend, problem.shape())),
                                         block(attend->k).row_count(), threads, kernel));
    } else if (const auto* back = std::get_if<AttendBackward>(&step)) {
      const Shape& shape = problem.shape();
      for (const Range heads : heads_served(program, *back, shape)) {
        most = std::max(most, attend_backward_bytes(shape, block(back->q).row_count(), heads,
                                                    block(back->k).row_count(),
                                                    shape.key_heads_of(heads).size(),
                                                    shape.value_heads_of(heads).size(), threads,
                                                    kernel));
      }
    }
  }
  return most;
}

Index bytes_a_rank(const std::vector<RankReport>& ranks) {
  constexpr double kUsable = 0.9;
  Index least = 0;
  for (const RankReport& rank : ranks) {
    const auto share = std::count_if(ranks.begin(), ranks.end(), [&](const RankReport& other) {
      return other.host.name == rank.host.name;
    });
    const auto bytes = static_cast<Index>(kUsable * static_cast<double>(rank.host.available_bytes) /
                                          static_cast<double>(share));
    if (bytes > 0 && (least == 0 || bytes < least)) least = bytes;
  }
  return least;
}

}  // namespace dattn
