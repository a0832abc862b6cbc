// Question: how close does each strategy come to 1/P of one rank's kernel, forward and
// forward+backward?
//
//   mpirun -np 16 bench_strategies --strategies all --ranks 1,2,4,8,16 --tokens-per-rank 8K
//          --scaling strong --heads 32 --kv-heads 8 --head-dim 128 --mask causal --pass both
//
// The ideal is the kernel on 1/P of the area without a message: each rank attends the query rows
// that it owns under the strategy's partition to all keys that they see, which lie in its memory,
// in one call.
//   of_ideal_busy   all ranks do so at once; their mean time (over the mean area, where a partition
//                   deals areas unevenly) over the strategy's time: what messages and plans cost
//   of_ideal_alone  the rank with most area does so while the others sleep; its time for the mean
//                   area over the strategy's: what sharing caches, memory and heat costs, too
// Each repeat runs the ideals and then every strategy once; a ratio is of one repeat, a figure the
// median, a time the slowest rank's. A strategy that refuses has a row that says why.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numbers>
#include <random>
#include <sstream>

#include "bench/main.hpp"
#include "bench/rest.hpp"
#include "bench/trial.hpp"
#include "launcher/host.hpp"
#include "launcher/memory.hpp"
#include "launcher/output_file.hpp"
#include "launcher/rank_speeds.hpp"
#include "launcher/report.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"
#include "launcher/version.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;

constexpr const char* kName = "bench_strategies";

po::options_description described_options() {
  std::vector<std::string> names{"all"};
  for (const Strategy& strategy : strategies()) names.emplace_back(strategy.name);
  po::options_description options(
      "bench_strategies: each strategy beside 1/P of one rank's kernel, in one MPI job");
  options.add(problem_options()).add(split_options(false)).add(speeds_option());
  po::options_description work("Bench");
  work.add_options()  //
      ("strategies", words(names)->default_value({"all"}, "all"),
       "which ones, as a comma list (see dattn list)")  //
      ("ranks", po::value<std::string>(),
       "numbers of ranks, e.g. 1,2,4; the first ones of the job work, the others sleep [1, 2, 4, "
       "... and all]")  //
      ("scaling", word({"auto", "strong", "weak"})->default_value("auto"),
       "strong: the same problem for all numbers of ranks; weak: as many tokens a rank [weak with "
       "--tokens-per-rank, else strong]")  //
      ("tokens-per-rank", po::value<Positive>(),
       "instead of --tokens; with strong scaling, a rank of the largest number")  //
      ("packed", po::value<Positive>(),
       "instead of --mask: causal documents of this mean length, log-normal, from --seed")  //
      ("pass", word({"forward", "both"})->default_value("forward"),
       "both: also backward, from a generated dO")                            //
      ("repeat", po::value<Positive>()->default_value({7}), "timed repeats")  //
      ("seconds", po::value<Positive>(),
       "for all repeats of one number of ranks: fewer are made if more do not fit, at least one")  //
      ("ideal", word({"both", "busy"})->default_value("both"),
       "busy: without the ideal of one rank alone, which takes as long as that of all at once")  //
      ("threads", po::value<Positive>()->default_value({1}), "OpenMP threads a rank")            //
      ("csv", po::value<std::string>(), "write the rows as CSV [- for standard output]")         //
      ("json", po::value<std::string>(),
       "write settings and rows as JSON [- for standard output]")  //
      ("help", "this text");
  return options.add(work);
}

/// What the bench was told to do.
struct Options {
  std::vector<int> ranks;   ///< ascending
  std::vector<Task> tasks;  ///< one for each of `ranks`
  std::string scaling;
  TrialOptions trial;
  std::string csv, json;

  bool quiet() const { return csv == "-" || json == "-"; }
};

std::vector<int> ranks_of(const po::variables_map& values, int all) {
  std::vector<int> ranks;
  if (values.count("ranks") == 0) {
    for (int p = 1; p < all; p *= 2) ranks.push_back(p);
    ranks.push_back(all);
    return ranks;
  }
  const std::string& text = values["ranks"].as<std::string>();
  std::istringstream list(text + ",");
  for (std::string item; std::getline(list, item, ',');) {
    int p = 0;
    const auto [end, error] = std::from_chars(item.data(), item.data() + item.size(), p);
    if (error != std::errc{} || end != item.data() + item.size() || p < 1 || p > all) {
      throw Failure(Exit::usage,
                    fmt::format("--ranks: {} in {} is no number of ranks from 1 to {}, the job's; "
                                "start more with mpirun -np, or ask for fewer",
                                in_quotes(item), in_quotes(text), all));
    }
    ranks.push_back(p);
  }
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  return ranks;
}

/// Causal documents that fill `tokens`, most short and some long, as training packs them. Fewer
/// tokens get the first of the same documents.
std::string packed_mask(Index tokens, Index mean, Index seed) {
  constexpr double kSigma = 1;
  std::mt19937_64 bits(static_cast<std::uint64_t>(seed));
  const auto uniform = [&] { return (static_cast<double>(bits() >> 11U) + 0.5) * 0x1p-53; };
  std::string words;
  while (tokens > 0) {
    const double normal =
        std::sqrt(-2 * std::log(uniform())) * std::cos(2 * std::numbers::pi * uniform());
    const double length = static_cast<double>(mean) * std::exp(kSigma * normal - kSigma / 2);
    const Index n = std::clamp<Index>(static_cast<Index>(std::min(length, 1e15)), 1, tokens);
    words += (words.empty() ? "documents:" : ",") + std::to_string(n);
    tokens -= n;
  }
  return words + "+causal";
}

/// The problem for `ranks` ranks, read as if the user had written its tokens and mask.
Task task_for(const po::options_description& described, const std::vector<std::string>& arguments,
              const po::variables_map& values, Index ranks) {
  std::vector<std::string> all = arguments;
  const bool per_rank = values.count("tokens-per-rank") != 0;
  const bool files = values.count("q") + values.count("k") + values.count("v") > 0;
  const auto refuse = [](const std::string& why) { throw Failure(Exit::usage, why); };
  if (per_rank && values.count("tokens") != 0) {
    refuse("--tokens-per-rank and --tokens say the same thing; leave one of them out");
  }
  if (per_rank && files) refuse("--tokens-per-rank: with --q, --k and --v the files say it");
  Index tokens = 0;
  if (per_rank) {
    tokens = values["tokens-per-rank"].as<Positive>().value;
    if (tokens > (Index{1} << 40) / ranks) refuse("--tokens-per-rank: the sum is too large");
    tokens *= ranks;
    all.insert(all.end(), {"--tokens", std::to_string(tokens)});
  } else if (values.count("tokens") != 0) {
    tokens = values["tokens"].as<Positive>().value;
  }
  if (values.count("packed") != 0) {
    if (!values["mask"].defaulted() || values.count("head-masks") != 0) {
      refuse("--packed and --mask or --head-masks: leave one of them out");
    }
    if (tokens == 0) refuse("--packed wants --tokens or --tokens-per-rank");
    const Index mean = values["packed"].as<Positive>().value;
    constexpr Index kMost = 100000;
    if (tokens / mean > kMost) refuse("--packed: that makes too many documents; take longer ones");
    all.insert(all.end(), {"--mask", packed_mask(tokens, mean, values["seed"].as<Count>().value)});
  }
  Task task = make_task(parse(kName, described, all));
  if (values["pass"].as<std::string>() == "both") {
    task.wish.gradients = true;
    task.source.add_d_o(values["seed"].as<Count>().value);
  }
  return task;
}

Options read_options(const po::options_description& described,
                     const std::vector<std::string>& arguments, int all_ranks) {
  const po::variables_map values = parse(kName, described, arguments);
  Options options;
  options.ranks = ranks_of(values, all_ranks);
  const bool per_rank = values.count("tokens-per-rank") != 0;
  options.scaling = values["scaling"].as<std::string>();
  if (options.scaling == "auto") options.scaling = per_rank ? "weak" : "strong";
  const bool weak = options.scaling == "weak";
  if (weak && !per_rank) throw Failure(Exit::usage, "--scaling weak wants --tokens-per-rank");
  for (const int p : options.ranks) {
    Task& task = options.tasks.emplace_back(
        task_for(described, arguments, values, weak ? p : options.ranks.back()));
    if (task.rank_speeds.empty() || speeds_are_measured(task)) continue;
    // A list is of the largest number of ranks; fewer have the first ones of it.
    const Speeds all = speeds_from(task.rank_speeds, options.ranks.back());
    std::vector<double> first;
    for (int r = 0; r < p; ++r) first.push_back(all.of(r));
    const Speeds some(first);
    task.rank_speeds = some.equal() ? "" : some.text();
  }
  const auto limited = [&](const char* name, Index most) {
    const Index value = values[name].as<Positive>().value;
    if (value <= most) return static_cast<int>(value);
    throw Failure(Exit::usage, fmt::format("--{}: at most {}, not {}", name, most, value));
  };
  options.trial.repeats = limited("repeat", 1000000);
  if (values.count("seconds") != 0) options.trial.seconds = limited("seconds", 1000000);
  options.trial.alone = values["ideal"].as<std::string>() == "both";
  options.trial.threads = limited("threads", 1024);
  options.trial.strategies = values["strategies"].as<std::vector<std::string>>();
  if (std::find(options.trial.strategies.begin(), options.trial.strategies.end(), "all") !=
      options.trial.strategies.end()) {
    options.trial.strategies.clear();
    for (const Strategy& strategy : strategies()) {
      options.trial.strategies.emplace_back(strategy.name);
    }
  }
  options.trial.bytes_a_rank = options.tasks.front().wish.memory;
  options.csv = file_name(values, "csv");
  options.json = file_name(values, "json");
  if (options.csv == "-" && options.json == "-") {
    throw Failure(Exit::usage,
                  "only one of --json and --csv can go to standard output; give the other a file");
  }
  const std::string inputs[] = {file_name(values, "q"), file_name(values, "k"),
                                file_name(values, "v")};
  const std::string outputs[] = {options.csv, options.json};
  refuse_same_file(inputs, outputs);
  for (const std::string& file : outputs) {
    if (!file.empty() && file != "-") refuse_unwritable(file);
  }
  try {
    chosen_isa();
  } catch (const std::invalid_argument& e) {  // DATTN_ISA names none
    throw Failure(Exit::usage, e.what() + std::string("; set it to one of these, or unset it"));
  }
  return options;
}

/// Collective: memory that there is for each rank, and a note if threads outnumber cpus.
Index memory_of_ranks(Communicator& world, int threads, std::string& note) {
  RankReport own;
  own.host = this_host();
  own.threads = threads;
  std::vector<RankReport> ranks;
  for (const std::string& text : world.all_gather(encoded(own))) ranks.push_back(decoded(text));
  for (const RankReport& rank : ranks) {
    const auto sharing = std::count_if(ranks.begin(), ranks.end(), [&](const RankReport& other) {
      return other.host.name == rank.host.name && other.host.cpus == rank.host.cpus;
    });
    if (sharing * threads > rank.host.cpu_count && note.empty()) {
      note = fmt::format("{} threads share {} cpus ({}): times are not scaling figures",
                         sharing * threads, rank.host.cpu_count, rank.host.name);
    }
  }
  return bytes_a_rank(ranks);
}

/// The best rate of one rank, by pass, is what speedups are counted from.
void add_speedups(std::vector<Row>& rows, std::map<std::string, double>& one_rank) {
  for (const Row& row : rows) {
    if (row.ranks != 1 || !row.refused.empty()) continue;
    double& best = one_rank[row.pass];
    best = std::max(best, row.gflops());
  }
  for (Row& row : rows) {
    if (row.refused.empty() && one_rank[row.pass] > 0) {
      row.speedup = row.gflops() / one_rank[row.pass];
    }
  }
}

void bench(Communicator& world, const Options& options) {
  const bool leads = world.rank() == 0;
  const auto say = [&](const std::string& text) {
    if (!leads) return;
    if (options.quiet()) {
      std::fputs(text.c_str(), stderr);
    } else {
      write_text_file("-", text);
    }
  };
  std::vector<std::string> notes(1);
  TrialOptions trial_options = options.trial;
  const Index available = memory_of_ranks(world, trial_options.threads, notes.front());
  if (trial_options.bytes_a_rank == 0) trial_options.bytes_a_rank = available;
  if (notes.front().empty()) notes.clear();
  say(fmt::format("# dattn {}: {}, kernels for {}, {} scaling, median of {}{}\n", kVersion, kName,
                  chosen_isa().name, options.scaling, trial_options.seconds > 0 ? "up to " : "",
                  trial_options.repeats));
  for (const std::string& note : notes) say("# NOTE: " + note + "\n");

  std::vector<Row> rows;
  nlohmann::ordered_json machines;
  nlohmann::ordered_json speeds;
  std::map<std::string, double> one_rank;
  for (std::size_t i = 0; i < options.ranks.size(); ++i) {
    const int p = options.ranks[i];
    const Task& task = options.tasks[i];
    Communicator some = world.split(world.rank() < p ? 0 : 1, world.rank());
    if (world.rank() < p) {
      Trial trial = try_strategies(some, task, trial_options);
      add_speedups(trial.rows, one_rank);
      machines[std::to_string(p)] = trial.machine.text();
      const Shape& s = task.shape;
      const std::string& mask = task.mask_words;
      if (!trial.speeds.equal()) speeds[std::to_string(p)] = trial.speeds.text();
      say(
          fmt::format("\n{} ranks x {} threads, {} queries, {} keys, heads {}:{}, dim {}:{}, mask "
                      "{}, {}, wire {}\nmachine: {}\n",
                      p, trial_options.threads, s.queries, s.keys, s.query_heads, s.key_heads,
                      s.d_qk, s.d_v, mask.size() > 60 ? mask.substr(0, 57) + "..." : mask,
                      name_of(task.type), name_of(task.wish.wire), trial.machine.text()));
      say(speeds_line(task, trial.speeds));
      if (!trial.note.empty()) {
        notes.push_back(fmt::format("{} ranks: {}", p, trial.note));
        say("# NOTE: " + trial.note + "\n");
      }
      if (leads) say(to_table(trial.rows));
      rows.insert(rows.end(), trial.rows.begin(), trial.rows.end());
    }
    rest_until_all(world);
  }
  together(world, [&] {
    if (!leads) return;
    std::vector<nlohmann::ordered_json> lines;
    for (const Row& row : rows) lines.push_back(fields(row));
    if (!options.csv.empty()) write_text_file(options.csv, to_csv(lines));
    if (options.json.empty()) return;
    nlohmann::ordered_json report{{"bench", "strategies"},
                                  {"version", 1},
                                  {"program", fmt::format("dattn {}", kVersion)},
                                  {"isa", chosen_isa().name},
                                  {"scaling", options.scaling},
                                  {"machines", machines},
                                  {"notes", notes}};
    if (!speeds.empty()) report["rank_speeds"] = speeds;
    report["rows"] = lines;
    write_text_file(options.json, report.dump(1) + "\n");
  });
}

}  // namespace
}  // namespace dattn

int main(int argc, char** argv) {
  const auto described = dattn::described_options();
  return dattn::bench_main(
      dattn::kName, argc, argv, described,
      [&](dattn::comm::Communicator& world, const std::vector<std::string>& arguments) {
        dattn::Options options;
        dattn::together(world,
                        [&] { options = dattn::read_options(described, arguments, world.size()); });
        dattn::bench(world, options);
      });
}
