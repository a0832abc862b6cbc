#include "launcher/memory.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

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
        most = std::max(most, attend_backward_bytes(
                                  shape, block(back->q).row_count(), heads,
                                  block(back->k).row_count(), shape.key_heads_of(heads).size(),
                                  threads, kernel));
      }
    }
  }
  return most;
}

Index transport_bytes(int ranks) {
  constexpr Index kOnce = Index{4} << 20;
  constexpr Index kEach = Index{256} << 10;
  return ranks == 1 ? 0 : kOnce + kEach * (ranks - 1);
}

std::vector<Room> rooms_of(const std::vector<RankReport>& ranks) {
  // Of what a host has some is for the system, whose estimate it is; a limit is exact.
  constexpr double kUsable = 0.9;
  const std::string available = "MemAvailable";
  std::vector<Room> rooms;
  for (int r = 0; r < static_cast<int>(ranks.size()); ++r) {
    const Host& host = ranks[static_cast<std::size_t>(r)].host;
    for (const Limit& limit : host.limits) {
      const Index bytes = limit.name == available
                              ? static_cast<Index>(kUsable * static_cast<double>(limit.left))
                              : limit.left;
      const auto same = std::find_if(rooms.begin(), rooms.end(), [&](const Room& room) {
        return room.shared && room.name == limit.name && room.host == host.name;
      });
      if (same == rooms.end()) {
        rooms.push_back({limit.name, host.name, limit.shared, {{r}, bytes}});
      } else {
        same->budget.ranks.push_back(r);
        same->budget.bytes = std::min(same->budget.bytes, bytes);
      }
    }
  }
  return rooms;
}

std::vector<Budget> budgets_of(const std::vector<Room>& rooms) {
  std::vector<Budget> budgets;
  for (const Room& room : rooms) budgets.push_back(room.budget);
  return budgets;
}

Index bytes_a_rank(const std::vector<RankReport>& ranks) {
  Index least = 0;
  for (const Room& room : rooms_of(ranks)) {
    const Index share = std::max<Index>(room.budget.bytes / std::ssize(room.budget.ranks), 1);
    if (least == 0 || share < least) least = share;
  }
  return least;
}

namespace {

Index needed_in(const Room& room, const std::vector<Needs>& needs) {
  Index sum = 0;
  for (const int r : room.budget.ranks) sum += needs[static_cast<std::size_t>(r)].sum();
  return sum;
}

/// "ranks 0-3, 8".
std::string ranks_text(const std::vector<int>& ranks) {
  std::string out = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size();) {
    std::size_t last = i;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    out += fmt::format("{}{}", i == 0 ? "" : ", ", ranks[i]);
    if (last > i) out += fmt::format("-{}", ranks[last]);
    i = last + 1;
  }
  return out;
}

/// The uses that some rank has.
std::vector<Use> uses_of(const std::vector<Needs>& needs) {
  std::vector<Use> uses;
  for (std::size_t u = 0; u < kUses; ++u) {
    const Use use = static_cast<Use>(u);
    if (std::any_of(needs.begin(), needs.end(), [&](const Needs& n) { return n[use] > 0; })) {
      uses.push_back(use);
    }
  }
  return uses;
}

}  // namespace

bool fits(const std::vector<Needs>& needs, const std::vector<Room>& rooms, Index memory) {
  return std::all_of(needs.begin(), needs.end(),
                     [&](const Needs& n) { return memory == 0 || n.sum() <= memory; }) &&
         std::all_of(rooms.begin(), rooms.end(),
                     [&](const Room& r) { return needed_in(r, needs) <= r.budget.bytes; });
}

std::string memory_table(const std::vector<Needs>& needs, const std::vector<Room>& rooms,
                         Index memory) {
  constexpr std::size_t kShown = 16;
  const std::vector<Use> uses = uses_of(needs);
  std::string out = fmt::format("# memory {:>5}", "rank");
  for (const Use use : uses) out += fmt::format(" {:>11}", name_of(use));
  out += fmt::format(" {:>11}\n", "sum");
  std::vector<std::size_t> order(needs.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (needs.size() > kShown) {  // those that need most
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return needs[a].sum() > needs[b].sum(); });
    order.resize(kShown);
  }
  for (const std::size_t r : order) {
    out += fmt::format("# memory {:>5}", r);
    for (const Use use : uses) out += fmt::format(" {:>11}", in_bytes(needs[r][use]));
    out += fmt::format(" {:>11}\n", in_bytes(needs[r].sum()));
  }
  if (needs.size() > kShown) {
    out += fmt::format("# memory ... and {} ranks that need no more\n", needs.size() - kShown);
  }
  const auto most = std::max_element(needs.begin(), needs.end(),
                                     [](auto& a, auto& b) { return a.sum() < b.sum(); });
  if (memory > 0) {
    out += fmt::format("# memory needed at most {} a rank, --memory {}{}\n", in_bytes(most->sum()),
                       in_bytes(memory), most->sum() > memory ? ": TOO LITTLE" : "");
  }
  for (const Room& room : rooms) {
    const Index bytes = needed_in(room, needs);
    const bool short_of = bytes > room.budget.bytes;
    // A process's own limit says something only where it is what stops the job.
    if (!room.shared && !short_of) continue;
    out += fmt::format("# memory needed {} by {} on {}, there: {} ({}){}\n", in_bytes(bytes),
                       ranks_text(room.budget.ranks), room.host, in_bytes(room.budget.bytes),
                       room.name, short_of ? ": TOO LITTLE" : "");
  }
  return out;
}

nlohmann::json memory_json(const std::vector<Needs>& needs, const std::vector<Room>& rooms,
                           Index memory) {
  const std::vector<Use> uses = uses_of(needs);
  nlohmann::json ranks = nlohmann::json::array();
  for (const Needs& one : needs) {
    nlohmann::json row;
    for (const Use use : uses) row[name_of(use)] = one[use];
    row["sum"] = one.sum();
    ranks.push_back(std::move(row));
  }
  nlohmann::json limits = nlohmann::json::array();
  for (const Room& room : rooms) {
    limits.push_back({{"name", room.name},
                      {"host", room.host},
                      {"ranks", room.budget.ranks},
                      {"needed", needed_in(room, needs)},
                      {"there", room.budget.bytes}});
  }
  nlohmann::json j{{"by_rank", std::move(ranks)}, {"limits", std::move(limits)}};
  if (memory > 0) j["memory"] = memory;
  return j;
}

}  // namespace dattn
