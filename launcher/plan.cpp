#include <fmt/format.h>

#include <algorithm>

#include "launcher/commands.hpp"
#include "launcher/hosts_report.hpp"
#include "launcher/output_file.hpp"
#include "launcher/rank_speeds.hpp"
#include "launcher/remedy.hpp"
#include "launcher/report.hpp"
#include "launcher/values.hpp"
#include "parallel/cache.hpp"

namespace dattn {
namespace {

/// What a proved plan of so many steps costs, rank by rank.
std::string figures(const Rehearsal& rehearsal, std::size_t steps, const Machine& machine,
                    const Speeds& speeds) {
  std::string text = fmt::format("verdict: ok; {} steps, {} allowed (head, query, key) triples\n",
                                 steps, rehearsal.pairs_total());
  text += fmt::format("forecast: {:.6f} s on {}\n", rehearsal.forecast_seconds(), machine.title());
  const bool equal = speeds.equal();
  text += fmt::format("{:>6} {:>16} {:>16} {:>20} {:>12} {:>12}{}\n", "rank", "bytes sent",
                      "memory bytes", "pairs", "compute s", "wait s", equal ? "" : "    speed");
  constexpr std::size_t kShown = 64;
  const std::size_t ranks = rehearsal.bytes_sent.size();
  for (std::size_t r = 0; r < std::min(ranks, kShown); ++r) {
    text += fmt::format("{:>6} {:>16} {:>16} {:>20} {:>12.6f} {:>12.6f}{}\n", r,
                        rehearsal.bytes_sent[r], rehearsal.memory_bytes[r], rehearsal.pairs[r],
                        rehearsal.compute_seconds[r], rehearsal.wait_seconds[r],
                        equal ? "" : fmt::format(" {:>8.4g}", speeds.of(static_cast<int>(r))));
  }
  if (ranks > kShown) {
    text += fmt::format("   ... and {} more ranks (--json has them all)\n", ranks - kShown);
  }
  return text;
}

/// What decoding must keep, of all ranks and heads.
std::string cache_line(const Problem& problem, const CacheNeed& cache) {
  Index kept = 0;
  Index most = 0;
  for (int r = 0; r < problem.ranks(); ++r) {
    kept += cache.bytes(problem, r);
    most = std::max(most, cache.bytes(problem, r));
  }
  const Shape& s = problem.shape();
  const Index whole =
      s.keys * (s.key_heads * s.d_qk + s.value_heads * s.d_v) * dattn::bytes_of(problem.type());
  return fmt::format("KV cache: later queries see {} of {}{}, {} at most on a rank", in_bytes(kept),
                     in_bytes(whole),
                     problem.compensate() == Compensate::off ? "" : " (pseudo-keys included)",
                     in_bytes(most));
}

nlohmann::json cache_json(const Problem& problem, const CacheNeed& cache) {
  nlohmann::json bytes = nlohmann::json::array();
  for (int r = 0; r < problem.ranks(); ++r) bytes.push_back(cache.bytes(problem, r));
  nlohmann::json j{{"key_tokens", cache.keys}, {"value_tokens", cache.values}, {"bytes", bytes}};
  if (problem.compensate() != Compensate::off) {
    j["pseudo_keys"] = cache.pseudo_keys;
    j["pseudo_values"] = cache.pseudo_values;
  }
  return j;
}

}  // namespace

Exit plan_command(const std::vector<std::string>& arguments) {
  namespace po = boost::program_options;
  po::options_description options("dattn plan: proves and prices a plan, without MPI or data");
  options.add(problem_options())
      .add(key_weights_option())
      .add(compensate_option())
      .add(split_options())
      .add(hosts_option());
  options.add(speeds_option());
  po::options_description own("Plan");
  own.add_options()                                                               //
      ("ranks", po::value<Positive>()->required(), "how many ranks to plan for")  //
      ("backward", "also plan the backward pass")                                 //
      ("print", "print every rank's steps")                                       //
      ("needs", "print what each rank needs memory for")                          //
      ("verify-wire", "count the memory that run --verify-wire takes")            //
      ("threads", po::value<Positive>()->default_value({1}),
       "OpenMP threads a rank, whose memory counts")  //
      ("json", po::value<std::string>(),
       "write the plan's figures as JSON [- for standard output]")  //
      ("help", "this text");
  options.add(own);
  const auto values = parse("dattn plan", options, with_default_files(arguments));
  if (values.count("help") != 0) return print_help(options);
  const Index ranks = values["ranks"].as<Positive>().value;
  constexpr Index kMostRanks = 65536;
  if (ranks > kMostRanks) {
    throw Failure(Exit::usage, fmt::format("--ranks: at most {}, not {}", kMostRanks, ranks));
  }
  constexpr Index kMostThreads = 1024;
  const int threads = at_most("threads", values["threads"].as<Positive>().value, kMostThreads);
  const std::string json_path = file_name(values, "json");
  if (!json_path.empty() && json_path != "-") refuse_unwritable(json_path);

  Task task = make_task(values);
  refuse_same_file(task.input_files, std::span(&json_path, 1));
  task.wish.hosts = hosts_from(task.hosts, static_cast<int>(ranks), {});
  task.wish.speeds = speeds_from(task.rank_speeds, static_cast<int>(ranks));
  const Setting setting{task,
                        std::vector<int>(static_cast<std::size_t>(ranks), threads),
                        false,
                        {},
                        values.count("verify-wire") != 0};
  const Machine machine = machine_of(task.machine, {.name = task.machine_name});
  const Choice choice = choose_within(setting, machine, true);
  std::vector<Planned> passes =
      plan_passes(*choice.strategy, *choice.problem, task.passes(), machine);
  const std::vector<Index> slots = slot_bytes(*choice.problem, passes);
  const std::vector<Needs> needs = needs_of(*choice.problem, passes, setting.beside());
  std::vector<Rehearsal> rehearsals;
  std::string text;
  std::size_t steps = 0;  // of the forward pass
  for (Planned& planned : passes) {
    const Plan& plan = planned.plan;
    const Pass pass = plan.front().pass;
    rehearsals.push_back(std::move(planned.rehearsal));
    std::size_t count = 0;
    for (const Program& program : plan) count += program.steps.size();
    if (pass == Pass::forward) steps = count;
    text += plan_line(choice, rehearsals.back(), pass) + "\n";
    if (!plan.front().note.empty()) text += "choice: " + plan.front().note + "\n";
    if (!rehearsals.back().fault) {
      text += hosts_line(choice, rehearsals.back());
      text += figures(rehearsals.back(), count, machine, task.wish.speeds);
    }
    if (values.count("print") != 0) {
      for (const Program& program : plan) text += dattn::text(program);
    }
  }
  if (task.wish.gradients) text += memory_line(choice, slots) + "\n";
  if (task.wish.compensate != Compensate::off) text += compensation_line(*choice.problem) + "\n";
  if (values.count("needs") != 0) text += memory_table(needs, {}, task.wish.memory);
  const CacheNeed cache = cache_need(*choice.problem);
  text += cache_line(*choice.problem, cache) + "\n";
  const bool wrong = std::any_of(rehearsals.begin(), rehearsals.end(),
                                 [](const Rehearsal& r) { return r.fault.has_value(); });
  if (!json_path.empty()) {
    nlohmann::json j = plan_json(task, choice, rehearsals, slots);
    j["version"] = 1;
    j["command"] = "plan";
    j["steps"] = steps;
    j["memory"] = memory_json(needs, {}, task.wish.memory);
    j["machine"] = machine.text();
    j["machine_name"] = machine.name;
    j["kv_cache"] = cache_json(*choice.problem, cache);
    write_text_file(json_path, j.dump(1) + "\n");
  }
  // Standard output belongs to the JSON where that was asked for.
  if (json_path != "-") write_text_file("-", text);
  return wrong ? Exit::internal : Exit::ok;
}

}  // namespace dattn
