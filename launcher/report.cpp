#include "launcher/report.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <numeric>

#include "launcher/hosts_report.hpp"
#include "launcher/moved.hpp"
#include "launcher/rank_speeds.hpp"
#include "launcher/version.hpp"
#include "parallel/pseudo_keys.hpp"

namespace dattn {
namespace {

using nlohmann::json;

struct Spread {
  double least = 0;
  double mean = 0;
  double most = 0;
};

Spread spread(const std::vector<double>& values) {
  if (values.empty()) return {};
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  return {*least,
          std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size()),
          *most};
}

/// One figure of the median run, by rank.
std::vector<double> by_rank(const RunReport& report, Pass pass, const auto& figure) {
  const std::size_t run = report.median_run(pass);
  std::vector<double> values;
  for (const RankReport& rank : report.ranks) values.push_back(figure(rank.of(pass)[run]));
  return values;
}

double other(const RunTimes& t) { return std::max(0.0, t.seconds - t.compute - t.wait); }

struct Phase {
  const char* name;
  const char* key;
  double (*of)(const RunTimes&);
};

constexpr Phase kPhases[] = {
    {"compute", "compute", [](const RunTimes& t) { return t.compute; }},
    {"exposed wait", "wait", [](const RunTimes& t) { return t.wait; }},
    {"other", "other", other},
    {"hidden communication", "hidden", [](const RunTimes& t) { return t.hidden; }},
};

Index bytes_sent(const RunReport& report, Pass pass) {
  Index sum = 0;
  for (const RankReport& rank : report.ranks) sum += rank.of(pass).front().bytes_sent;
  return sum;
}

double median_seconds(const RunReport& report, Pass pass) {
  return report.run_seconds(pass)[report.median_run(pass)];
}

double gflops(const RunReport& report, Pass pass) {
  const Shape& s = report.task->shape;
  const double pair = pass == Pass::forward ? s.flops_per_pair() : s.backward_flops_per_pair();
  return static_cast<double>(report.rehearsal(pass).pairs_total()) * pair /
         median_seconds(report, pass) / 1e9;
}

/// Of the work, that of the rank that computes longest, over what it would have if all were at work
/// as long.
double largest_share(const Problem& problem, const Rehearsal& r) {
  const Speeds& speeds = problem.speeds();
  if (speeds.equal()) {
    const Index mean = r.pairs_total() / problem.ranks();
    const Index most = *std::max_element(r.pairs.begin(), r.pairs.end());
    return mean == 0 ? 1.0 : static_cast<double>(most) / static_cast<double>(mean);
  }
  double longest = 0;
  double speed = 0;
  for (int rank = 0; rank < problem.ranks(); ++rank) {
    const auto pairs = static_cast<double>(r.pairs[static_cast<std::size_t>(rank)]);
    longest = std::max(longest, pairs / speeds.of(rank));
    speed += speeds.of(rank);
  }
  const auto all = static_cast<double>(r.pairs_total());
  return all == 0 ? 1.0 : longest * speed / all;
}

/// What a plan costs, into `j`.
void add_figures(json& j, const Rehearsal& r) {
  j["messages"] = r.messages;
  j["host_links"] = host_links_json(r);
  j["bytes_between_hosts"] = r.bytes_between_hosts();
  j["bytes_sent"] = r.bytes_sent;
  j["bytes_sent_total"] = r.bytes_sent_total();
  j["memory_bytes"] = r.memory_bytes;
  j["pairs"] = r.pairs;
  j["pairs_total"] = r.pairs_total();
  j["dead_steps"] = r.dead.size();
  j["forecast_seconds"] = r.forecast_seconds();
  j["forecast"] = {{"seconds", r.seconds},
                   {"compute_seconds", r.compute_seconds},
                   {"wait_seconds", r.wait_seconds}};
}

/// What the runs of a pass were like, into `j`, which has its plan's figures.
void add_runs(json& j, const RunReport& report, Pass pass) {
  json sent = json::array();
  for (const RankReport& r : report.ranks) sent.push_back(r.of(pass).front().bytes_sent);
  j["planned_bytes_sent"] = j["bytes_sent"];
  j["bytes_sent"] = std::move(sent);
  j["bytes_sent_total"] = bytes_sent(report, pass);
  j["moved"] = moved_json(report, pass);
  if (report.verify_wire) j["verified"] = verified_json(report, pass);
  j["run_seconds"] = report.run_seconds(pass);
  j["seconds"] = median_seconds(report, pass);
  for (const Phase& phase : kPhases) {
    const auto values = by_rank(report, pass, phase.of);
    const Spread s = spread(values);
    j["phases"][phase.key] = {
        {"min", s.least}, {"avg", s.mean}, {"max", s.most}, {"by_rank", values}};
  }
  j["gflops"] = gflops(report, pass);
}

}  // namespace

std::vector<double> RunReport::run_seconds(Pass pass) const {
  std::vector<double> seconds(ranks.front().of(pass).size(), 0);
  for (const RankReport& rank : ranks) {
    for (std::size_t i = 0; i < seconds.size(); ++i) {
      seconds[i] = std::max(seconds[i], rank.of(pass)[i].seconds);
    }
  }
  return seconds;
}

std::size_t RunReport::median_run(Pass pass) const {
  const std::vector<double> seconds = run_seconds(pass);
  std::vector<std::size_t> order(seconds.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return seconds[a] < seconds[b]; });
  return order[(order.size() - 1) / 2];
}

std::string in_bytes(Index bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, kUnits[unit]);
}

std::string plan_line(const Choice& choice, const Rehearsal& r, Pass pass) {
  const Problem& problem = *choice.problem;
  const std::string what = pass == Pass::forward ? "plan" : "backward plan";
  if (r.fault) {
    return fmt::format("{}: {} REFUSED: {}", what, choice.strategy->name, r.fault->text());
  }
  return fmt::format(
      "{}: {} over {} ranks (mesh {}), partition {}{}: {} messages, {} sent, memory at most {} a "
      "rank, largest share of the work {:.3f} of {}; proved",
      what, choice.strategy->name, problem.ranks(), problem.mesh().text(), problem.partition(),
      problem.prefetch() > 1 ? fmt::format(", {} stages ahead", problem.prefetch()) : "",
      r.messages, in_bytes(r.bytes_sent_total()),
      in_bytes(*std::max_element(r.memory_bytes.begin(), r.memory_bytes.end())),
      largest_share(problem, r), problem.speeds().equal() ? "the mean" : "what fits its speed");
}

std::string memory_line(const Choice& choice, const std::vector<Index>& slot_bytes) {
  std::string line = fmt::format(
      "memory of both passes: slots of at most {} a rank, {}",
      in_bytes(*std::max_element(slot_bytes.begin(), slot_bytes.end())),
      choice.problem->keeps() ? "those of the forward pass kept for the Q, K, V by head in them"
                              : "one pass after the other");
  if (choice.may_use > 0) {
    line += fmt::format("; with kernels and results {} of the {} that a rank may use",
                        in_bytes(choice.needs), in_bytes(choice.may_use));
  }
  if (!choice.problem->keeps() && choice.needs_to_keep > 0) {
    line += fmt::format(", to keep Q, K, V by head would take {}", in_bytes(choice.needs_to_keep));
  }
  return line;
}

namespace {

/// Dropped keys of each key head.
std::vector<Index> dropped_by_key_head(const Problem& problem) {
  std::vector<Index> dropped(static_cast<std::size_t>(problem.shape().key_heads), 0);
  for (const Dropped& entry : problem.dropped()) {
    dropped[static_cast<std::size_t>(entry.key_head)] = size(entry.keys);
  }
  return dropped;
}

json compensation_json(const Problem& problem) {
  json j{{"pseudo_keys", pseudo_key_count(problem)},
         {"dropped_keys", dropped_by_key_head(problem)}};
  for (int r = 0; r < problem.ranks(); ++r) {
    const PseudoKeyCost cost = pseudo_key_cost(problem, r);
    j["bytes_sent"].push_back(cost.bytes_sent);
    j["memory_bytes"].push_back(cost.memory_bytes);
  }
  return j;
}

}  // namespace

std::string compensation_line(const Problem& problem) {
  const std::vector<Index> dropped = dropped_by_key_head(problem);
  const auto heads = std::ssize(dropped) - std::count(dropped.begin(), dropped.end(), 0);
  if (heads == 0) {
    return "compensation: the queries see every key before the first of them; nothing is dropped";
  }
  Index sent = 0;
  for (int r = 0; r < problem.ranks(); ++r) sent += pseudo_key_cost(problem, r).bytes_sent;
  return fmt::format(
      "compensation: {} pseudo-keys, one a {}, for what {} of {} key heads drop, {} of {} keys at "
      "most; {} of what is sent is theirs",
      pseudo_key_count(problem),
      problem.compensate() == Compensate::head ? "head" : "head and rank", heads, dropped.size(),
      *std::max_element(dropped.begin(), dropped.end()), problem.shape().keys, in_bytes(sent));
}

json plan_json(const Task& task, const Choice& choice, const std::vector<Rehearsal>& rehearsals,
               const std::vector<Index>& slot_bytes) {
  const Shape& s = task.shape;
  const auto wrong = std::find_if(rehearsals.begin(), rehearsals.end(),
                                  [](const Rehearsal& r) { return r.fault.has_value(); });
  json j{{"problem",
          {{"queries", s.queries},
           {"keys", s.keys},
           {"heads", s.query_heads},
           {"key_heads", s.key_heads},
           {"value_heads", s.value_heads},
           {"head_dim", s.d_qk},
           {"value_dim", s.d_v},
           {"mask", escaped(task.mask_words)},  // file names in it need not be UTF-8
           {"scale", task.scoring.score.scale},
           {"dtype", name_of(task.type)},
           {"wire", name_of(task.wish.wire)},
           {"compensate", name_of(task.wish.compensate)}}},
         {"strategy", choice.strategy->name},
         {"partition", choice.problem->partition()},
         {"mesh", choice.problem->mesh().text()},
         {"ranks", choice.problem->ranks()},
         {"hosts", hosts_json(choice)},
         {"prefetch", choice.problem->prefetch()},
         {"verdict", wrong != rehearsals.end() ? "fault" : "ok"}};
  add_scoring(j["problem"], task.scoring);
  const Speeds& speeds = choice.problem->speeds();
  for (int r = 0; r < speeds.size(); ++r) j["rank_speeds"].push_back(speeds.of(r));
  if (wrong != rehearsals.end()) {
    j["fault"] = {{"pass", name_of(static_cast<Pass>(wrong - rehearsals.begin()))},
                  {"rank", wrong->fault->rank},
                  {"step", wrong->fault->step},
                  {"what", wrong->fault->what}};
    return j;
  }
  add_figures(j, rehearsals.front());
  if (task.wish.compensate != Compensate::off) {
    j["compensation"] = compensation_json(*choice.problem);
  }
  if (rehearsals.size() > 1) {
    add_figures(j["backward"], rehearsals[1]);
    j["both_passes"] = {{"keeps", choice.problem->keeps()},
                        {"kept_bytes", rehearsals.front().kept_bytes},
                        {"memory_bytes", slot_bytes}};
    if (choice.needs > 0) j["both_passes"]["needed_bytes"] = choice.needs;
    if (choice.needs_to_keep > 0) j["both_passes"]["needed_bytes_to_keep"] = choice.needs_to_keep;
  }
  return j;
}

std::string heading(const RunReport& report) {
  std::string out = fmt::format("# dattn {}: run, kernels for {}\n", kVersion, report.isa);
  out +=
      fmt::format("# {:>5} {:<20} {:>8} {:<16} {:>7}\n", "rank", "host", "pid", "cpus", "threads");
  std::map<std::string, std::pair<int, int>> load;  // host and cpus -> threads, cpus
  for (std::size_t r = 0; r < report.ranks.size(); ++r) {
    const RankReport& rank = report.ranks[r];
    out += fmt::format("# {:>5} {:<20} {:>8} {:<16} {:>7}\n", r, rank.host.name, rank.host.pid,
                       rank.host.cpus, rank.threads);
    auto& [threads, cpus] = load[rank.host.name + " " + rank.host.cpus];
    threads += rank.threads;
    cpus = rank.host.cpu_count;
  }
  for (const auto& [where, use] : load) {
    if (use.first <= use.second) continue;
    out += fmt::format(
        "# NOTE: {} threads share {} cpus ({}): times are not scaling figures; start fewer ranks, "
        "lower --threads, or check mpirun's binding (--bind-to none)\n",
        use.first, use.second, where);
  }
  if (!report.windows_trouble.empty()) {
    out += fmt::format(
        "# NOTE: ranks of a host send through MPI, since they cannot see each other's memory ({}); "
        "--windows off leaves this note out\n",
        report.windows_trouble);
  }
  const Shape& s = report.task->shape;
  out += fmt::format(
      "problem: {} queries, {} keys, heads {} over {}:{}, dim {}:{}, mask {}, {}{}{}\n", s.queries,
      s.keys, s.query_heads, s.key_heads, s.value_heads, s.d_qk, s.d_v,
      report.task->mask_words.size() > 60 ? report.task->mask_words.substr(0, 57) + "..."
                                          : report.task->mask_words,
      report.task->type == Type::bf16 ? "bfloat16"
      : report.task->type == Type::f4 ? "float32"
                                      : "float64",
      text(report.task->scoring),
      report.task->wish.wire == Wire::bf16 ? ", sums sent as bfloat16" : "");
  out += fmt::format("forecasts: {}\n", report.machine.title());
  out += speeds_line(*report.task, report.choice->problem->speeds());
  for (const Pass pass : report.task->passes()) {
    out += plan_line(*report.choice, report.rehearsal(pass), pass) + "\n";
    out += hosts_line(*report.choice, report.rehearsal(pass));
  }
  if (report.task->wish.gradients) out += memory_line(*report.choice, report.slot_bytes) + "\n";
  if (report.task->wish.compensate != Compensate::off) {
    out += compensation_line(*report.choice->problem) + "\n";
  }
  return out;
}

static std::string results(const RunReport& report, Pass pass, bool verified) {
  const std::vector<double> seconds = report.run_seconds(pass);
  const double median = median_seconds(report, pass);
  const double forecast = report.rehearsal(pass).forecast_seconds();
  std::string out = fmt::format(
      "{}time: median {:.6f} s of {} run{} (min {:.6f}, max {:.6f}); forecast {:.6f} s, forecast / "
      "measured {:.2f}\n",
      pass == Pass::forward ? "" : "backward ", median, seconds.size(),
      seconds.size() == 1 ? "" : "s", *std::min_element(seconds.begin(), seconds.end()),
      *std::max_element(seconds.begin(), seconds.end()), forecast, forecast / median);
  out += fmt::format("{:<22} {:>12} {:>12} {:>12}   over ranks, seconds\n", "phase", "min", "avg",
                     "max");
  for (const Phase& phase : kPhases) {
    const Spread s = spread(by_rank(report, pass, phase.of));
    out +=
        fmt::format("{:<22} {:>12.6f} {:>12.6f} {:>12.6f}\n", phase.name, s.least, s.mean, s.most);
  }
  const auto bytes = [](const RunTimes& t) { return static_cast<double>(t.bytes_sent); };
  const Spread sent = spread(by_rank(report, pass, bytes));
  out += fmt::format("{:<22} {:>12.0f} {:>12.0f} {:>12.0f}   bytes; {} in all\n", "sent",
                     sent.least, sent.mean, sent.most, in_bytes(bytes_sent(report, pass)));
  out += moved_line(report, pass);
  if (report.verify_wire) out += verified_line(report, pass);
  out += fmt::format("rate: {:.2f} GFLOP/s by allowed area{}\n", gflops(report, pass),
                     verified ? "" : " (unverified; add --check)");
  return out;
}

std::string results(const RunReport& report) {
  std::string out = results(report, Pass::forward, report.verdict.has_value());
  if (report.task->wish.gradients) {
    out += results(report, Pass::backward, report.gradient_verdict.has_value());
  }
  return out;
}

std::string text(const Verdict& v) {
  return fmt::format(
      "check: {} rows, ||O-Oref||/||Oref|| = {:.3e}, max|LSE-ref|/max(1,|ref|) = {:.3e}, the "
      "larger "
      "/ eps = {:.3f} (threshold {}) ...... {}",
      v.rows, v.relative_error, v.lse_error, v.residual, v.threshold,
      v.passed() ? "PASSED"
      : v.finite ? "FAILED"
                 : "FAILED (NaN or infinity)");
}

std::string text(const GradientVerdict& v) {
  return fmt::format(
      "check of gradients: {} rows of dQ, {} of dK and dV, ||X-Xref||/||Xref|| of dQ {:.3e}, dK "
      "{:.3e}, dV {:.3e}, the largest / eps = {:.3f} (threshold {}) ...... {}",
      v.query_rows, v.key_rows, v.dq_error, v.dk_error, v.dv_error, v.residual, v.threshold,
      v.passed() ? "PASSED"
      : v.finite ? "FAILED"
                 : "FAILED (NaN or infinity)");
}

json to_json(const RunReport& report) {
  json j = plan_json(*report.task, *report.choice, report.rehearsals, report.slot_bytes);
  j["version"] = 1;
  j["program"] = fmt::format("dattn {}", kVersion);
  j["command"] = "run";
  j["isa"] = report.isa;
  j["machine"] = report.machine.text();
  j["machine_name"] = report.machine.name;
  j["memory"] = report.memory;
  for (const RankReport& r : report.ranks) j["memory"]["took"].push_back(r.took);
  json ranks = json::array();
  for (const RankReport& r : report.ranks) {
    ranks.push_back({{"host", r.host.name},
                     {"pid", r.host.pid},
                     {"cpus", r.host.cpus},
                     {"threads", r.threads}});
  }
  j["rank_table"] = std::move(ranks);
  add_runs(j, report, Pass::forward);
  if (report.task->wish.gradients) add_runs(j["backward"], report, Pass::backward);
  if (report.verdict) {
    const Verdict& v = *report.verdict;
    j["check"] = {{"rows", v.rows},           {"relative_error", v.relative_error},
                  {"lse_error", v.lse_error}, {"residual", v.residual},
                  {"threshold", v.threshold}, {"passed", v.passed()}};
  }
  if (report.gradient_verdict) {
    const GradientVerdict& v = *report.gradient_verdict;
    j["backward"]["check"] = {{"query_rows", v.query_rows}, {"key_rows", v.key_rows},
                              {"dq_error", v.dq_error},     {"dk_error", v.dk_error},
                              {"dv_error", v.dv_error},     {"residual", v.residual},
                              {"threshold", v.threshold},   {"passed", v.passed()}};
  }
  return j;
}

std::string to_csv(const RunReport& report) {
  const Shape& s = report.task->shape;
  const std::vector<double> seconds = report.run_seconds(Pass::forward);
  const auto mean = [&](double (*figure)(const RunTimes&)) {
    return spread(by_rank(report, Pass::forward, figure)).mean;
  };
  const auto verdict = [](const auto& v) {
    return !v ? std::string("unchecked,")
              : fmt::format("{},{:.6g}", v->passed() ? "passed" : "failed", v->residual);
  };
  // Only the mask can hold a comma.
  std::string row = fmt::format(
      "{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},\"{}\",{:.9g},{:.9g},{:.9g},{:.9g},{:.6g},{}"
      ","
      "{:.9g},{:.9g},{:.9g},{},",
      report.choice->strategy->name, report.choice->problem->partition(),
      report.choice->problem->mesh().text(), report.ranks.size(), report.ranks.front().threads,
      report.isa, name_of(report.task->type), name_of(report.task->wish.wire),
      name_of(report.task->wish.compensate), s.queries, s.keys, s.query_heads, s.key_heads,
      s.value_heads, s.d_qk, s.d_v, report.task->mask_words, median_seconds(report, Pass::forward),
      *std::min_element(seconds.begin(), seconds.end()),
      *std::max_element(seconds.begin(), seconds.end()),
      report.rehearsal(Pass::forward).forecast_seconds(), gflops(report, Pass::forward),
      bytes_sent(report, Pass::forward), mean(kPhases[0].of), mean(kPhases[1].of),
      mean(kPhases[3].of), verdict(report.verdict));
  if (report.task->wish.gradients) {
    row += fmt::format("{:.9g},{:.9g},{:.6g},{},{}", median_seconds(report, Pass::backward),
                       report.rehearsal(Pass::backward).forecast_seconds(),
                       gflops(report, Pass::backward), bytes_sent(report, Pass::backward),
                       verdict(report.gradient_verdict));
  } else {
    row += ",,,,,";
  }
  return "strategy,partition,mesh,ranks,threads,isa,dtype,wire,compensate,queries,keys,heads,"
         "key_heads,value_heads,"
         "head_dim,value_dim,mask,seconds,seconds_min,seconds_max,forecast_seconds,gflops,"
         "bytes_sent_total,compute,wait,hidden,check,residual,backward_seconds,"
         "backward_forecast_seconds,backward_gflops,backward_bytes_sent_total,gradient_check,"
         "gradient_residual\n" +
         row + "\n";
}

std::string trace_events(const Program& program, const RunTimes& times, double from) {
  json events = json::array();
  events.push_back({{"name", "process_name"},
                    {"ph", "M"},
                    {"pid", program.rank},
                    {"args", {{"name", fmt::format("rank {}", program.rank)}}}});
  constexpr double kMicro = 1e6;
  for (std::size_t i = 0; i < program.steps.size(); ++i) {
    const std::string words = dattn::text(program, program.steps[i]);
    const StepTime& t = times.steps[i];
    const auto event = [&](const std::string& name, double begin, double end) {
      events.push_back({{"name", name},
                        {"ph", "X"},
                        {"pid", program.rank},
                        {"tid", 0},
                        {"ts", (from + begin) * kMicro},
                        {"dur", (end - begin) * kMicro},
                        {"args", {{"step", i}, {"what", words}}}});
    };
    // A step waits first, then works; a collective only waits.
    if (t.wait > 0) event("wait", t.begin, t.begin + t.wait);
    event(words.substr(0, words.find(' ')), t.begin + t.wait, t.end);
  }
  return events.dump();
}

std::string trace_file(const std::vector<std::string>& events_of_ranks) {
  std::string out = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";
  bool first = true;
  for (const std::string& events : events_of_ranks) {
    if (events.size() <= 2) continue;  // "[]"
    out += (first ? "\n" : ",\n") + events.substr(1, events.size() - 2);
    first = false;
  }
  return out + "\n]}\n";
}

}  // namespace dattn
