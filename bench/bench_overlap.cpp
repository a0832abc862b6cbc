// Question: how much of its communication does a strategy hide behind its kernels, on a link that
// takes no CPU for it, and what is polling worth?
//
//   bench/shaped --link hosts --ranks 2 build/release/bench/bench_overlap --strategies
//   ring,lightseq
//                --tokens-per-rank 512,1K,2K,4K --mask causal --pass both --comm-over-compute 0.7
//
// Each repeat runs a plan's kernels without its messages, its messages without its kernels, both
// together, and both without polling:  hidden = 1 - (both - kernels) / messages.
// bench/shaped builds the link and gives the command by which the bench sets its rate, so that
// messages take the share of the kernels' time that was asked for.
#include <fmt/format.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>

#include "bench/main.hpp"
#include "bench/measure.hpp"
#include "bench/overlap.hpp"
#include "bench/rows.hpp"
#include "kernels/isa.hpp"
#include "launcher/host.hpp"
#include "launcher/output_file.hpp"
#include "launcher/report.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"
#include "launcher/version.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;

constexpr const char* kName = "bench_overlap";

po::options_description described_options() {
  std::vector<std::string> names{"all"};
  for (const Strategy& strategy : strategies()) names.emplace_back(strategy.name);
  po::options_description options(
      "bench_overlap: how much communication each strategy hides behind its kernels");
  options.add(problem_options()).add(split_options(false));
  po::options_description work("Bench");
  work.add_options()  //
      ("strategies", words(names)->default_value({"ring", "lightseq"}, "ring,lightseq"),
       "which ones, as a comma list (see dattn list)")  //
      ("tokens-per-rank", po::value<std::string>(),
       "instead of --tokens; a comma list, one problem each")  //
      ("pass", word({"forward", "both"})->default_value("forward"),
       "both: also backward, from a generated dO")  //
      ("comm-over-compute", po::value<Finite>()->default_value({0.7}),
       "seconds of a step's messages over those of its kernels, to which the link is set")  //
      ("set-rate", po::value<std::string>()->default_value(""),
       "a command that has this host send at most so many bytes a second, its last argument; "
       "bench/shaped gives it [the link stays as it is]")  //
      ("piece", po::value<Positive>(),
       "bytes at which messages are cut [what dattn run takes]")  //
      ("rest", po::value<Finite>()->default_value({0}),
       "sleep before each run for this share of the time of the last; see bench/README.md")  //
      ("repeat", po::value<Positive>()->default_value({9}), "timed repeats")                 //
      ("threads", po::value<Positive>()->default_value({1}), "OpenMP threads a rank")        //
      ("csv", po::value<std::string>(), "write the rows as CSV [- for standard output]")     //
      ("json", po::value<std::string>(),
       "write settings and rows as JSON [- for standard output]")  //
      ("help", "this text");
  return options.add(work);
}

/// What the bench was told to do.
struct Options {
  std::vector<Task> tasks;
  std::vector<std::string> strategies;
  OverlapOptions overlap;
  std::string set_rate;
  Index piece = 0;  ///< 0: the transport's own
  std::string csv, json;

  bool quiet() const { return csv == "-" || json == "-"; }
};

/// The comma list of numbers of tokens; one 0 where there is none.
std::vector<Index> tokens_per_rank(const po::variables_map& values) {
  if (values.count("tokens-per-rank") == 0) return {0};
  return counts_of("tokens-per-rank", values["tokens-per-rank"].as<std::string>());
}

/// One problem a number of tokens, read as if the user had written it.
std::vector<Task> tasks_of(const po::options_description& described,
                           const std::vector<std::string>& arguments,
                           const po::variables_map& values, Index ranks) {
  std::vector<Task> tasks;
  for (const Index each : tokens_per_rank(values)) {
    std::vector<std::string> all = arguments;
    if (each > 0) {
      if (values.count("tokens") + values.count("q") + values.count("k") + values.count("v") > 0) {
        throw Failure(Exit::usage,
                      "--tokens-per-rank: --tokens, --q, --k and --v say the same thing; leave "
                      "one of them out");
      }
      if (each > (Index{1} << 40) / ranks) {
        throw Failure(Exit::usage, "--tokens-per-rank: the sum is too large");
      }
      all.insert(all.end(), {"--tokens", std::to_string(each * ranks)});
    }
    tasks.push_back(make_task(parse(kName, described, all)));
    if (values["pass"].as<std::string>() == "both") {
      tasks.back().wish.gradients = true;
      tasks.back().source.add_d_o(values["seed"].as<Count>().value);
    }
  }
  return tasks;
}

Options read_options(const po::options_description& described,
                     const std::vector<std::string>& arguments, int ranks) {
  const po::variables_map values = parse(kName, described, arguments);
  Options options;
  if (ranks < 2) {
    throw Failure(Exit::usage, "one rank has no messages; start two or more with mpirun -np");
  }
  options.tasks = tasks_of(described, arguments, values, ranks);
  options.overlap.ratio = values["comm-over-compute"].as<Finite>().value;
  if (options.overlap.ratio <= 0) {
    throw Failure(Exit::usage, "--comm-over-compute: want a number above 0, e.g. 0.7");
  }
  options.overlap.rest = values["rest"].as<Finite>().value;
  if (options.overlap.rest < 0 || options.overlap.rest > 10) {
    throw Failure(Exit::usage, "--rest: want a number from 0 to 10, e.g. 0.15");
  }
  const auto limited = [&](const char* name, Index most) {
    const Index value = values[name].as<Positive>().value;
    if (value <= most) return value;
    throw Failure(Exit::usage, fmt::format("--{}: at most {}, not {}", name, most, value));
  };
  options.overlap.repeats = static_cast<int>(limited("repeat", 1000000));
  options.overlap.threads = static_cast<int>(limited("threads", 1024));
  if (values.count("piece") != 0) options.piece = limited("piece", Index{1} << 30);
  options.set_rate = values["set-rate"].as<std::string>();
  options.strategies = values["strategies"].as<std::vector<std::string>>();
  if (std::find(options.strategies.begin(), options.strategies.end(), "all") !=
      options.strategies.end()) {
    options.strategies.clear();
    for (const Strategy& strategy : strategies()) options.strategies.emplace_back(strategy.name);
  }
  options.csv = file_name(values, "csv");
  options.json = file_name(values, "json");
  if (options.quiet() && options.csv == options.json) {
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

/// Runs `command` with the rate once on every host, on its first rank.
std::function<void(double)> rate_setter(Communicator& world, const std::string& command) {
  if (command.empty()) return {};
  const std::vector<std::string> hosts = world.all_gather(this_host().name);
  const auto here = static_cast<std::size_t>(world.rank());
  const bool first = std::find(hosts.begin(), hosts.end(), hosts[here]) - hosts.begin() ==
                     static_cast<std::ptrdiff_t>(here);
  return [&world, command, first](double bytes_a_second) {
    together(world, [&] {
      if (!first) return;
      const std::string line = fmt::format("{} {:.0f}", command, bytes_a_second);
      const int status = std::system(line.c_str());
      if (status == 0) return;
      throw Failure(Exit::usage,
                    fmt::format("--set-rate: {} ended with {}; run it by hand to see why",
                                in_quotes(line), WIFEXITED(status) ? WEXITSTATUS(status) : 255));
    });
  };
}

void bench(Communicator& world, Options options) {
  const bool leads = world.rank() == 0;
  const auto say = [&](const std::string& text) {
    if (!leads) return;
    if (options.quiet()) {
      std::fputs(text.c_str(), stderr);
    } else {
      write_text_file("-", text);
    }
  };
  options.overlap.set_rate = rate_setter(world, options.set_rate);
  if (options.piece > 0) {
    Communicator::Options wanted = world.options();
    wanted.piece = wanted.piece_abroad = options.piece;
    world.set_options(wanted);
  }
  say(
      fmt::format("# dattn {}: {}, kernels for {}, {} ranks x {} threads, messages cut at {}, "
                  "between hosts at {}, median of {}\n",
                  kVersion, kName, chosen_isa().name, world.size(), options.overlap.threads,
                  in_bytes(world.options().piece), in_bytes(world.options().piece_abroad),
                  options.overlap.repeats));
  std::vector<nlohmann::ordered_json> lines;
  for (const Task& task : options.tasks) {
    const Shape& s = task.shape;
    say(fmt::format("\n{} queries, {} keys, heads {}:{}, dim {}:{}, mask {}, {}\n", s.queries,
                    s.keys, s.query_heads, s.key_heads, s.d_qk, s.d_v, task.mask_words,
                    name_of(task.type)));
    std::vector<OverlapRow> rows;
    for (const std::string& strategy : options.strategies) {
      const auto more = measure_overlap(world, task, strategy, options.overlap);
      rows.insert(rows.end(), more.begin(), more.end());
    }
    say(to_table(rows));
    for (const OverlapRow& row : rows) lines.push_back(fields(row));
  }
  together(world, [&] {
    if (!leads) return;
    if (!options.csv.empty()) write_text_file(options.csv, to_csv(lines));
    if (options.json.empty()) return;
    const nlohmann::ordered_json report{{"bench", "overlap"},
                                        {"version", 1},
                                        {"program", fmt::format("dattn {}", kVersion)},
                                        {"isa", chosen_isa().name},
                                        {"comm_over_compute", options.overlap.ratio},
                                        {"rows", lines}};
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
