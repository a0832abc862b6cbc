#include "launcher/remedy.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <numeric>

#include "launcher/verify.hpp"

namespace dattn {
namespace {

/// Seconds that may go by before a search for remedies ends with what it has.
constexpr std::chrono::seconds kPatience{10};
/// What is there may be a little less when the advice is taken.
constexpr double kSafe = 0.99;

Wish limited_wish(const Setting& setting, double share) {
  Wish wish = setting.task.wish;
  wish.ranks = setting.ranks();
  wish.beside = setting.beside();
  wish.budgets = budgets_of(setting.rooms);
  for (Budget& budget : wish.budgets) {
    budget.bytes = static_cast<Index>(share * static_cast<double>(budget.bytes));
  }
  return wish;
}

std::optional<Choice> fitting(const Setting& setting) {
  const Task& task = setting.task;
  try {
    return leanest(limited_wish(setting, kSafe), task.shape, task.mask, task.type);
  } catch (const std::invalid_argument&) {  // every strategy refuses
    return {};
  }
}

/// The setting on `hosts` hosts with `each` ranks, each like the first host of the job. Nothing if
/// the job's hosts have unequal numbers of ranks, or --mesh, --hosts or --rank-speeds say how many
/// ranks there are.
std::optional<Setting> spread_over(const Setting& setting, int hosts, int each) {
  const Wish& wish = setting.task.wish;
  if (wish.mesh || !setting.task.hosts.empty() || !wish.speeds.equal()) return {};
  Setting other = setting;
  const int threads = *std::max_element(setting.threads.begin(), setting.threads.end());
  other.threads.assign(static_cast<std::size_t>(hosts * each), threads);
  std::vector<int> by_rank;
  for (int r = 0; r < hosts * each; ++r) by_rank.push_back(r / each);
  other.task.wish.hosts = Hosts(by_rank);
  other.rooms.clear();
  for (const Room& room : setting.rooms) {
    // Processes are taken to have the first one's limits.
    if (room.host != setting.rooms.front().host || room.budget.ranks.front() > 0) continue;
    for (int r = 0; r < hosts * each; r += room.shared ? each : 1) {
      Room& same = other.rooms.emplace_back(room);
      same.budget.ranks.resize(room.shared ? static_cast<std::size_t>(each) : 1);
      std::iota(same.budget.ranks.begin(), same.budget.ranks.end(), r);
    }
  }
  return other;
}

/// A search for what fits, cheap changes first.
class Remedies {
 public:
  explicit Remedies(const Setting& setting) : setting_(setting) {}

  /// "--prefetch 1; or --dtype bf16"; empty if nothing was found.
  std::string find() {
    try_more_memory();
    // By themselves, then together.
    Setting all = setting_;
    std::string words;
    for (const auto& change : changes()) {
      Setting one = setting_;
      const std::string word = change(one);
      if (word.empty()) continue;
      offer(one, word);
      words += (words.empty() ? "" : ", ") + change(all);
    }
    if (found_.empty() && !words.empty()) offer(all, words);
    if (found_.empty()) try_ranks();
    if (found_.empty()) try_tokens();
    constexpr std::size_t kMost = 3;
    std::string out;
    for (std::size_t i = 0; i < std::min(kMost, found_.size()); ++i) {
      out += (i == 0 ? "" : "; or ") + found_[i];
    }
    return out;
  }

 private:
  using Change = std::function<std::string(Setting&)>;

  bool late() const { return std::chrono::steady_clock::now() - start_ > kPatience; }

  bool offer(const Setting& setting, const std::string& words) {
    if (late()) return false;
    if (!fitting(setting)) return false;
    found_.push_back(words);
    return true;
  }

  /// More of --memory, where the hosts have it.
  void try_more_memory() {
    if (setting_.task.wish.memory == 0) return;
    Setting roomy = setting_;
    roomy.task.wish.memory = Index{1} << 60;
    const std::optional<Choice> choice = fitting(roomy);
    if (!choice) return;
    constexpr Index kUnit = Index{1} << 20;
    const Index mebibytes = (choice->needs + kUnit - 1) / kUnit;
    found_.push_back(fmt::format("--memory {}M", mebibytes));
  }

  /// Each makes its change where it is one, and says it in words.
  static std::vector<Change> changes() {
    return {[](Setting& s) -> std::string {
              if (!s.check) return {};
              s.check = false;
              return "no --check";
            },
            [](Setting& s) -> std::string {
              if (s.task.wish.prefetch.value_or(1) == 1) return {};
              s.task.wish.prefetch = 1;
              return "--prefetch 1";
            },
            [](Setting& s) -> std::string {
              Wish& wish = s.task.wish;
              if (wish.strategy == "auto" && wish.partition == "auto" && !wish.mesh) return {};
              std::string words = wish.strategy == "auto" ? "" : "--strategy auto";
              if (wish.partition != "auto") {
                words += std::string(words.empty() ? "" : " ") + "--partition auto";
              }
              if (wish.mesh) words += std::string(words.empty() ? "" : " ") + "no --mesh";
              wish.strategy = wish.partition = "auto";
              wish.mesh.reset();
              return words;
            },
            [](Setting& s) -> std::string {
              if (*std::max_element(s.threads.begin(), s.threads.end()) == 1) return {};
              std::fill(s.threads.begin(), s.threads.end(), 1);
              return "--threads 1";
            },
            [](Setting& s) -> std::string {
              if (s.task.type == Type::bf16) return {};
              s.task.type = Type::bf16;
              return "--dtype bf16";
            }};
  }

  /// Other numbers of ranks on the same hosts, then more hosts like these.
  void try_ranks() {
    std::map<std::string, int> hosts;
    for (const Room& room : setting_.rooms) {
      hosts[room.host] = std::max(hosts[room.host], static_cast<int>(room.budget.ranks.size()));
    }
    const int count = std::max(1, static_cast<int>(hosts.size()));
    const int each = setting_.ranks() / count;
    if (each * count != setting_.ranks()) return;
    const auto offered = [&](int on, int ranks) {
      const auto other = spread_over(setting_, on, ranks);
      return other && offer(*other, fmt::format("{} ranks on {} host{}", on * ranks, on,
                                                on == 1 ? "" : "s"));
    };
    for (int fewer = each / 2; fewer >= 1; fewer /= 2) {
      if (offered(count, fewer)) return;
    }
    for (const int factor : {2, 4}) {
      if (offered(count, factor * each)) return;
    }
    for (const int factor : {2, 4, 8, 16}) {
      if (offered(factor * count, each)) return;
    }
  }

  /// Fewer tokens of generated inputs.
  void try_tokens() {
    const Shape& shape = setting_.task.shape;
    if (setting_.task.source.from_files() || shape.queries != shape.keys) return;
    for (Index tokens = shape.keys / 2; tokens >= 1024; tokens /= 2) {
      Setting fewer = setting_;
      fewer.task.shape.queries = fewer.task.shape.keys = tokens;
      try {
        fewer.task.mask = parse_mask(fewer.task.mask_words, fewer.task.shape);
      } catch (const std::invalid_argument&) {  // the mask says how many there are, or has files
        return;
      }
      const bool whole = tokens % 1024 == 0;
      if (offer(fewer,
                fmt::format("--tokens {}{}", whole ? tokens / 1024 : tokens, whole ? "K" : ""))) {
        return;
      }
    }
  }

  const Setting& setting_;
  std::vector<std::string> found_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

Beside Setting::beside() const {
  Beside all;
  all.kernels = [by_rank = threads](const Problem& problem, const Program& program) {
    return kernel_bytes(problem, program, by_rank[static_cast<std::size_t>(program.rank)]);
  };
  if (check) {
    all.check = [gradients = task.wish.gradients](const Problem& problem, const Program& program) {
      return check_bytes(problem, program, gradients);
    };
  }
  all.transport = transport_bytes(ranks());
  all.verifies = verify_wire;
  // All of them, and those that a kernel reads.
  if (task.scoring.key_weights_file.named())
    all.weights = 2 * task.scoring.key_weights_file.bytes();
  return all;
}

std::string remedy(const Setting& setting) { return Remedies(setting).find(); }

std::vector<Needs> needs_of(const Setting& setting, const Choice& choice) {
  std::vector<Needs> all;
  for (int r = 0; r < setting.ranks(); ++r) {
    const Program forward = make_program(*choice.strategy, *choice.problem, r, Pass::forward);
    std::optional<Program> backward;
    if (setting.task.wish.gradients) {
      backward = make_program(*choice.strategy, *choice.problem, r, Pass::backward);
    }
    all.push_back(
        needs_of(*choice.problem, forward, backward ? &*backward : nullptr, setting.beside()));
  }
  return all;
}

Choice choose_within(const Setting& setting, const Machine& machine, bool tell) {
  Task limited = setting.task;
  limited.wish = limited_wish(setting, 1);
  try {
    return choose_for(limited, setting.ranks(), machine);
  } catch (const DoesNotFit& e) {
    if (tell) {
      const std::string table =
          memory_table(needs_of(setting, e.least), setting.rooms, setting.task.wish.memory);
      std::fputs(table.c_str(), stderr);
    }
    const std::string words = remedy(setting);
    throw Failure(
        Exit::memory,
        fmt::format("{} needs {} on a rank, which has {}; {}", e.least.strategy->name,
                    in_bytes(e.least.needs), in_bytes(e.least.may_use),
                    words.empty()
                        ? "nothing that was tried fits: use more hosts, a larger --memory "
                          "or fewer tokens"
                        : "what fits: " + words));
  }
}

}  // namespace dattn
