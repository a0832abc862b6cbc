// dattn bench: a sweep over configurations, one JSON line each, that goes on where it was killed.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <set>
#include <sstream>

#include "comm/session.hpp"
#include "kernels/isa.hpp"
#include "launcher/commands.hpp"
#include "launcher/digests.hpp"
#include "launcher/host.hpp"
#include "launcher/job.hpp"
#include "launcher/output_file.hpp"
#include "launcher/rank_speeds.hpp"
#include "launcher/row_file.hpp"
#include "launcher/sweep.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"
#include "launcher/version.hpp"
#include "launcher/watch.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;
using nlohmann::ordered_json;

constexpr const char* kCommand = "dattn bench";
constexpr const char* kAuto = "auto";

po::options_description bench_options() {
  po::options_description options(
      "dattn bench: times configurations, one after the other, in one MPI job\n\n"
      "Options of the problem and its split, --threads and --prefetch too, may be lists: separated "
      "by commas (but for --mask, --head-masks and --rank-speeds), as several words, or repeated. "
      "Each combination is measured and adds one line to --out, but for those that have a line "
      "there already");
  options.add(problem_options())
      .add(key_weights_option())
      .add(compensate_option())
      .add(split_options());
  options.add(speeds_option());
  po::options_description work("Bench");
  work.add_options()  //
      ("threads", po::value<Positive>(),
       "OpenMP threads a rank [OMP_NUM_THREADS, or the host's cpus shared evenly]")  //
      ("backward", "also the backward pass, from a generated dO")                    //
      ("repeat", po::value<Positive>()->default_value({5}), "timed runs")            //
      ("warmup", po::value<Count>()->default_value({1}), "runs before those")        //
      ("check", "compare each result with the double reference, as dattn run does")  //
      ("out", po::value<std::string>()->required(),
       "file that gets a JSON line a configuration; rows that are in it are not measured again")  //
      ("again", "measure also what has a row; it gets another")                                   //
      ("help", "this text");
  return options.add(work).add(verify_wire_option()).add(watch_options());
}

const std::set<std::string>& lists() {
  static const std::set<std::string> names{
      "tokens",    "queries",    "heads",    "kv-heads", "value-heads", "head-dim",
      "value-dim", "seed",       "dtype",    "layer",    "scale",       "soft-cap",
      "sigmoid",   "compensate", "strategy", "wire",     "mesh",        "partition",
      "prefetch",  "memory",     "threads",  "relay"};
  return names;
}
const std::set<std::string>& whole_lists() {
  static const std::set<std::string> names{"mask",          "head-masks",  "rank-speeds", "alibi",
                                           "relative-bias", "key-weights", "sinks"};
  return names;
}

/// A configuration, what it is asked for as its row has it, and what its row goes by.
struct Entry {
  Configuration configuration;
  ordered_json asked;
  std::string key;
};

RunOptions run_options_of(const po::variables_map& values) {
  RunOptions options = read_work(values);
  if (options.task.wish.gradients) {
    options.task.source.add_d_o(values["seed"].as<Count>().value);
  }
  return options;
}

/// What a row says it was asked for: the options as they were read, whatever words they had.
ordered_json asked_of(const RunOptions& o, const po::variables_map& values) {
  const Task& task = o.task;
  const Shape& s = task.shape;
  const Wish& wish = task.wish;
  ordered_json j{{"queries", s.queries},
                 {"tokens", s.keys},
                 {"heads", s.query_heads},
                 {"kv_heads", s.key_heads},
                 {"value_heads", s.value_heads},
                 {"head_dim", s.d_qk},
                 {"value_dim", s.d_v},
                 {"mask", escaped(task.mask_words)},  // file names in it need not be UTF-8
                 {"dtype", name_of(task.type)},
                 {"wire", name_of(wish.wire)},
                 {"compensate", name_of(wish.compensate)},
                 {"scale", task.scoring.score.scale},
                 {"strategy", wish.strategy},
                 {"partition", wish.partition},
                 {"mesh", kAuto},
                 {"prefetch", kAuto},
                 {"memory", kAuto},
                 {"threads", kAuto},
                 {"backward", wish.gradients},
                 {"repeat", o.repeat},
                 {"warmup", o.warmup},
                 {"check", o.check}};
  add_scoring(j, task.scoring);
  if (wish.mesh) j["mesh"] = values["mesh"].as<MeshSize>().extents;
  if (wish.prefetch) j["prefetch"] = *wish.prefetch;
  if (wish.relays) j["relay"] = *wish.relays;
  if (o.verify_wire) j["verify_wire"] = true;
  if (!task.rank_speeds.empty()) j["rank_speeds"] = task.rank_speeds;
  if (wish.memory > 0) j["memory"] = wish.memory;
  if (o.threads > 0) j["threads"] = o.threads;
  if (!task.machine.empty()) j["machine"] = task.machine;
  if (!task.mask_sum.empty()) j["mask_sum"] = task.mask_sum;
  if (task.source.from_files()) {
    for (const char* name : {"q", "k", "v"}) j[name] = escaped(values[name].as<std::string>());
  } else {
    j["seed"] = values["seed"].as<Count>().value;
  }
  return j;
}

/// Seconds of the slowest rank, run by run, and what stands for them.
ordered_json times_of(const std::vector<double>& runs) {
  std::vector<double> sorted = runs;
  std::sort(sorted.begin(), sorted.end());
  const auto at = [&](double share) {  // the least that so large a share of the runs do not exceed
    const auto n = static_cast<double>(sorted.size());
    return sorted[static_cast<std::size_t>(std::max(1.0, std::ceil(share * n)) - 1)];
  };
  return {{"runs", runs},   {"median", at(0.5)}, {"min", sorted.front()},
          {"p20", at(0.2)}, {"p80", at(0.8)},    {"max", sorted.back()}};
}

ordered_json pass_of(const RunReport& report, const nlohmann::json& all, Pass pass) {
  const nlohmann::json& from = pass == Pass::forward ? all : all.at("backward");
  ordered_json j{{"seconds", times_of(report.run_seconds(pass))}};
  for (const auto& [name, phase] : from.at("phases").items()) {
    j["phases"][name] = {{"min", phase["min"]}, {"avg", phase["avg"]}, {"max", phase["max"]}};
  }
  for (const char* name :
       {"forecast_seconds", "gflops", "bytes_sent_total", "messages", "pairs_total"}) {
    j[name] = from.at(name);
  }
  if (from.contains("check")) j["check"] = from["check"];
  return j;
}

/// What was measured, into the row.
void add_report(ordered_json& row, const RunReport& report) {
  const nlohmann::json all = to_json(report);
  row["resolved"] = {{"strategy", all["strategy"]},
                     {"partition", all["partition"]},
                     {"mesh", all["mesh"]},
                     {"prefetch", all["prefetch"]},
                     {"keeps", report.choice->problem->keeps()},
                     {"threads", report.ranks.front().threads}};
  if (all.contains("rank_speeds")) row["resolved"]["rank_speeds"] = all["rank_speeds"];
  row["machine"] = all["machine"];
  row["forward"] = pass_of(report, all, Pass::forward);
  if (report.task->wish.gradients) row["backward"] = pass_of(report, all, Pass::backward);
  Index took = 0;
  for (const RankReport& rank : report.ranks) took = std::max(took, rank.took);
  nlohmann::json most;
  for (const nlohmann::json& rank : report.memory.at("by_rank")) {
    if (most.is_null() || rank.at("sum") > most.at("sum")) most = rank;
  }
  row["memory"] = {{"needed", most}, {"took", took}};
}

/// What the user wrote of the problem, where no more can be made of it.
ordered_json words_of(const std::vector<std::string>& arguments) {
  ordered_json words = ordered_json::array();
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--out")
      ++i;  // where a row lies is no part of it
    else if (arguments[i] != "--again" && !arguments[i].starts_with("--out="))
      words.push_back(escaped(arguments[i]));
  }
  return {{"words", words}};
}

/// The sweep, on every rank.
class Sweep {
 public:
  Sweep(Communicator& world, comm::Watchdog& watchdog, const po::options_description& described,
        const std::vector<std::string>& arguments)
      : world_(world), watchdog_(watchdog), described_(described) {
    together(world_, [&] { read(arguments); });
    Signature fields{{"options", fmt::format("{}", fmt::join(arguments, " "))},
                     {"instruction set", chosen_isa().name},
                     {"version", std::string(kVersion)}};
    for (const Entry& entry : entries_) fields.emplace_back("problem", entry.asked.dump());
    require_agreement(world_, fields);
    std::set<std::string> hosts;
    for (std::string& name : world_.all_gather(comm::processor_name())) hosts.insert(name);
    host_count_ = hosts.size();
    for (Entry& entry : entries_) entry.key = hash_of(heading(entry).dump());
  }

  Exit run() {
    std::string todo;
    together(world_, [&] {
      if (world_.rank() != 0) return;
      file_.emplace(out_);
      todo = fmt::format("{} ", file_->begin());
      std::size_t count = 0;
      std::set<std::string> seen;
      for (std::size_t i = 0; i < entries_.size(); ++i) {
        if (!seen.insert(entries_[i].key).second) continue;  // the same in other words
        if (!again_ && file_->keys().contains(entries_[i].key)) continue;
        todo += fmt::format("{} ", i);
        ++count;
      }
      say(
          fmt::format("# dattn {}: bench, {} ranks on {} hosts, kernels for {}; {} configurations, "
                      "{} of them in {} already\n",
                      kVersion, world_.size(), host_count_, chosen_isa().name, seen.size(),
                      seen.size() - count, quoted_path(out_)));
    });
    world_.broadcast(todo, 0);
    std::istringstream list(todo);
    list >> begin_;
    std::vector<std::size_t> order;
    for (std::size_t i = 0; list >> i;) order.push_back(i);
    bool right = true;
    for (std::size_t n = 0; n < order.size(); ++n) {
      const Exit ended = measure(entries_[order[n]], fmt::format("[{}/{}]", n + 1, order.size()));
      right = right && ended != Exit::check_failed;
    }
    return right ? Exit::ok : Exit::check_failed;
  }

 private:
  void say(const std::string& text) const {
    if (world_.rank() == 0) write_text_file("-", text);
  }

  /// All configurations, read and checked as far as they can be before anything is measured. What
  /// no option can be stops the sweep; what options cannot be together is for its row to say.
  void read(const std::vector<std::string>& arguments) {
    std::size_t sound = 0;
    std::optional<Failure> first;
    for (Configuration& one : sweep(arguments, lists(), whole_lists())) {
      const po::variables_map values = parse(kCommand, described_, one.arguments);
      Entry& entry = entries_.emplace_back(Entry{std::move(one), {}, {}});
      out_ = file_name(values, "out");
      again_ = values.count("again") != 0;
      try {
        entry.asked = asked_of(run_options_of(values), values);
        ++sound;
      } catch (const Failure& e) {
        if (!first) first = e;
        entry.asked = words_of(entry.configuration.arguments);
      }
    }
    if (sound == 0) throw *first;
    if (out_ == "-") throw Failure(Exit::usage, "--out wants a file, not '-'");
    if (world_.rank() == 0) refuse_unwritable(out_);
    try {
      chosen_isa();
    } catch (const std::invalid_argument& e) {  // DATTN_ISA names none
      throw Failure(Exit::usage, e.what() + std::string("; set it to one of these, or unset it"));
    }
  }

  /// The front of a row: what was asked for, and of whom.
  ordered_json heading(const Entry& entry) const {
    return {{"bench", 1},
            {"key", entry.key},
            {"program", fmt::format("dattn {}", kVersion)},
            {"ranks", world_.size()},
            {"hosts", host_count_},
            {"isa", chosen_isa().name},
            {"asked", entry.asked}};
  }

  /// Measures a configuration and adds its row, or that of its failure.
  Exit measure(const Entry& entry, const std::string& place) {
    ordered_json row = heading(entry);
    const auto ends = [&](Exit code, const std::string& why) {
      row["exit"] = static_cast<int>(code);
      row["reason"] = why.empty() ? ordered_json() : ordered_json(why);
    };
    Exit ended = Exit::ok;
    std::string figures;
    try {
      std::optional<RunOptions> options;
      together(world_, [&] {
        options = run_options_of(parse(kCommand, described_, entry.configuration.arguments));
      });
      options->report = [&](const RunReport& report) {
        add_report(row, report);
        const ordered_json& forward = row["forward"];
        const double median = forward["seconds"]["median"];
        figures = fmt::format("{} {}, {:.6f} s (forecast / measured {:.2f})",
                              row["resolved"]["strategy"].get<std::string>(),
                              row["resolved"]["partition"].get<std::string>(), median,
                              forward["forecast_seconds"].get<double>() / median);
        if (row.contains("backward")) {
          figures += fmt::format(", backward {:.6f} s",
                                 row["backward"]["seconds"]["median"].get<double>());
        }
      };
      // A job that is stuck ends on the watchdog's thread; its row is for the next one, too.
      watchdog_.at_end([stuck = row, file = out_, begin = begin_, &watchdog = watchdog_]() mutable {
        stuck["exit"] = static_cast<int>(Exit::timeout);
        stuck["reason"] = fmt::format("no rank moved for {} s", watchdog.seconds());
        RowFile::add_last(file, begin, stuck);
      });
      ended = run_job(world_, watchdog_, *options);
      ends(ended, ended == Exit::check_failed ? "the check failed" : "");
      if (ended == Exit::check_failed) figures += ", CHECK FAILED";
    } catch (const JobFailure& e) {
      ended = e.code;
      ends(ended, e.what());
      figures = fmt::format("ended with {}: {}", static_cast<int>(e.code), e.what());
    } catch (const std::exception& e) {
      // This rank alone knows, and its job ends; the row is for the next one, which goes on behind.
      ends(code_of(e), e.what());
      RowFile::add_last(out_, begin_, row);
      throw;
    }
    watchdog_.at_end({});
    together(world_, [&] {
      if (world_.rank() != 0) return;
      file_->add(row);
      say(fmt::format("{} {}: {}\n", place, entry.configuration.differs, figures));
    });
    return ended;
  }

  Communicator& world_;
  comm::Watchdog& watchdog_;
  const po::options_description& described_;
  std::vector<Entry> entries_;
  std::string out_;
  bool again_ = false;
  std::size_t host_count_ = 1;
  std::size_t begin_ = 0;        ///< bytes of the file before this sweep
  std::optional<RowFile> file_;  ///< rank 0's
};

}  // namespace

Exit bench_command(const std::vector<std::string>& arguments) {
  const po::options_description described = bench_options();
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    return print_help(described);
  }
  return on_all_ranks(kCommand, early_watch(arguments), [&](Communicator& world, auto& watchdog) {
    world.phase("options");
    together(world, [&] {
      if (const auto complaint = comm::launch_complaint(
              world.size(), std::getenv("OMPI_COMM_WORLD_SIZE"), std::getenv("SLURM_NTASKS"))) {
        throw Failure(Exit::usage, *complaint);
      }
    });
    try {
      return Sweep(world, watchdog, described, arguments).run();
    } catch (const Disagreement& e) {
      if (world.rank() == 0) complain(world.rank(), kCommand, e.what());
      return Exit::usage;
    }
  });
}

}  // namespace dattn
