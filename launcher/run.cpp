#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>

#include "comm/error.hpp"
#include "comm/session.hpp"
#include "launcher/calibrate.hpp"
#include "launcher/commands.hpp"
#include "launcher/output_file.hpp"
#include "launcher/report.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"
#include "parallel/pairs.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;

struct RunOptions {
  Task task;
  int threads = 0;  ///< 0: choose
  int repeat = 1;
  int warmup = 0;
  bool check = false;
  double timeout = 300;
  std::string out, lse, json, csv, trace;

  /// Standard output is for people unless a report goes there.
  bool quiet() const { return json == "-" || csv == "-" || trace == "-"; }
};

po::options_description run_options() {
  po::options_description options("dattn run: computes attention over the ranks of an MPI job");
  options.add(problem_options()).add(split_options());
  po::options_description work("Work");
  work.add_options()  //
      ("threads", po::value<Positive>(),
       "OpenMP threads a rank [OMP_NUM_THREADS, or the host's cpus shared evenly]")  //
      ("repeat", po::value<Positive>()->default_value({1}),
       "timed runs; the median is reported")                                                      //
      ("warmup", po::value<Count>()->default_value({0}), "runs before those")                     //
      ("check", "compare with the double reference: all rows of a small problem, else a sample")  //
      ("timeout", po::value<Positive>()->default_value({300}),
       "seconds that a rank waits for others before it ends the job; never less than 20 times the "
       "forecast");
  po::options_description output("Output");
  output.add_options()                                                                         //
      ("out", po::value<std::string>(), "write O, [tokens, heads, value dim], as NumPy file")  //
      ("lse", po::value<std::string>(), "write LSE, [tokens, heads], as NumPy file")           //
      ("json", po::value<std::string>(), "write the report as JSON [- for standard output]")   //
      ("csv", po::value<std::string>(), "write the report as CSV")                             //
      ("trace", po::value<std::string>(), "write the last run as Chrome trace, a row a rank")  //
      ("help", "this text");
  options.add(work).add(output);
  return options;
}

RunOptions read_options(const po::variables_map& values) {
  RunOptions options;
  options.task = make_task(values);
  constexpr Index kMostThreads = 1024;
  constexpr Index kMostRuns = 1000000;
  const auto limited = [](const char* name, Index value, Index most) {
    if (value > most) {
      throw Failure(Exit::usage, fmt::format("--{}: at most {}, not {}", name, most, value));
    }
    return static_cast<int>(value);
  };
  options.threads = values.count("threads") != 0
                        ? limited("threads", values["threads"].as<Positive>().value, kMostThreads)
                        : threads_from_environment();
  options.repeat = limited("repeat", values["repeat"].as<Positive>().value, kMostRuns);
  options.warmup = limited("warmup", values["warmup"].as<Count>().value, kMostRuns);
  options.timeout = limited("timeout", values["timeout"].as<Positive>().value, 1000000);
  options.check = values.count("check") != 0;
  const auto path = [&](const char* name) { return file_name(values, name); };
  options.out = path("out");
  options.lse = path("lse");
  options.json = path("json");
  options.csv = path("csv");
  options.trace = path("trace");
  for (const std::string* tensor : {&options.out, &options.lse}) {
    if (*tensor == "-") throw Failure(Exit::usage, "--out and --lse want a file, not '-'");
  }
  if ((options.json == "-") + (options.csv == "-") + (options.trace == "-") > 1) {
    throw Failure(
        Exit::usage,
        "only one of --json, --csv and --trace can go to standard output; give the others "
        "a file");
  }
  const std::string inputs[] = {path("q"), path("k"), path("v")};
  const std::string outputs[] = {options.out, options.lse, options.json, options.csv,
                                 options.trace};
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

/// What the user wrote for one option.
std::string written(const std::vector<std::string>& arguments, const std::string& option) {
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].starts_with(option + "=")) return arguments[i].substr(option.size() + 1);
    if (arguments[i] != option) continue;
    const bool has_value = i + 1 < arguments.size() && !arguments[i + 1].starts_with("--");
    return has_value ? arguments[i + 1] : "given";
  }
  return "not given";
}

/// Fields in which ranks must agree: whatever changes the plan, the result or the order of
/// collectives, and every option.
Signature signature(const RunOptions& o, const po::options_description& described,
                    const std::vector<std::string>& arguments) {
  const Shape& s = o.task.shape;
  const auto number = [](auto n) { return std::to_string(n); };
  Signature fields{{"queries", number(s.queries)},
                   {"keys", number(s.keys)},
                   {"query heads", number(s.query_heads)},
                   {"key heads", number(s.key_heads)},
                   {"value heads", number(s.value_heads)},
                   {"head dim", number(s.d_qk)},
                   {"value dim", number(s.d_v)},
                   {"dtype", number(static_cast<int>(o.task.type))},
                   {"scale", fmt::format("{:a}", o.task.scale)},
                   {"instruction set", chosen_isa().name}};
  for (const auto& option : described.options()) {
    const std::string name = "--" + option->long_name();
    fields.emplace_back(name, written(arguments, name));
  }
  return fields;
}

/// Whether --machine leaves nothing to measure; the run then sends nothing but its plan.
bool describes_all(const std::string& machine) {
  return machine.find("latency=") != std::string::npos &&
         machine.find("bandwidth=") != std::string::npos &&
         machine.find("rate=") != std::string::npos;
}

int choose_threads(const RunOptions& options, const Host& host, Communicator& world) {
  // Every rank takes part: OMP_NUM_THREADS may be set for some of them only.
  int ranks_here = 0;
  for (const std::string& other : world.all_gather(host.name + " " + host.cpus)) {
    ranks_here += other == host.name + " " + host.cpus ? 1 : 0;
  }
  return options.threads > 0 ? options.threads : std::max(1, host.cpu_count / ranks_here);
}

/// Memory in bytes that the kernels of a rank take beside its slots, at most.
Index kernel_bytes(const Problem& problem, const Program& program, int threads) {
  Index most = 0;
  if (problem.type() == Type::f8) return most;
  for (const Step& step : program.steps) {
    const auto* attend = std::get_if<Attend>(&step);
    if (attend == nullptr) continue;
    const auto rows = [&](SlotId id) {
      return size(program.slots[static_cast<std::size_t>(id)].block.rows);
    };
    most = std::max(most, attend_bytes(problem.shape(), rows(attend->q),
                                       heads_served(program, *attend, problem.shape()).size(),
                                       rows(attend->k), threads, chosen_isa()));
  }
  return most;
}

/// Refuses a plan that does not fit into the memory of a host, before anything is allocated.
void require_memory(const std::vector<RankReport>& ranks, const Problem& problem, const Plan& plan,
                    const Rehearsal& rehearsal) {
  std::map<std::string, std::pair<Index, Index>> hosts;  // needed, available
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    auto& [needed, available] = hosts[ranks[r].host.name];
    // O and LSE leave the plan's Partial for arrays of their own, one number a record shorter.
    const Block& result = plan[r].result(Kind::O).block;
    needed += rehearsal.memory_bytes[r] + bytes_of(result, problem.shape(), problem.type()) +
              kernel_bytes(problem, plan[r], ranks[r].threads);
    available = ranks[r].host.available_bytes;
  }
  for (const auto& [name, need] : hosts) {
    if (need.second == 0 || need.first <= need.second) continue;
    throw Failure(
        Exit::memory,
        fmt::format("the plan needs {} on host {}, which has {} available; use more hosts, "
                    "fewer ranks on this one, or another --strategy (dattn plan shows the "
                    "memory of each rank)",
                    in_bytes(need.first), name, in_bytes(need.second)));
  }
}

/// One line on a terminal, now and then, while long work goes on. Rank 0 only.
class Progress {
 public:
  Progress(bool wanted, int runs, std::size_t steps)
      : wanted_(wanted), runs_(runs), steps_(steps) {}
  ~Progress() {
    if (shown_) std::fputs("\r\033[K", stderr);
  }
  void at(int run, std::size_t step) {
    if (!wanted_) return;
    const auto now = std::chrono::steady_clock::now();
    constexpr auto kPatience = std::chrono::seconds(2);  // short work needs no progress
    constexpr auto kPause = std::chrono::milliseconds(250);
    if (now - start_ < kPatience || now - last_ < kPause) return;
    last_ = now;
    shown_ = true;
    fmt::print(stderr, "\r\033[Krun {} of {}, step {} of {}", run + 1, runs_, step + 1, steps_);
    std::fflush(stderr);
  }

 private:
  bool wanted_;
  int runs_;
  std::size_t steps_;
  bool shown_ = false;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point last_ = start_;
};

/// Writes this rank's rows of a tensor [tokens, ...] into the file that all ranks write together.
/// Rank 0 has to commit it.
template <class T>
std::optional<OutputFile> write_tensor(Communicator& world, const std::string& path,
                                       const Problem& problem, const Block& delivers,
                                       std::vector<std::int64_t> shape, std::span<const T> values) {
  if (path.empty()) return {};
  const std::string header =
      npy_header(sizeof(T) == 4 ? NpyHeader::Type::f4 : NpyHeader::Type::f8, shape);
  Index row_bytes = sizeof(T);
  for (std::size_t i = 1; i < shape.size(); ++i) row_bytes *= shape[i];
  const Index total = static_cast<Index>(header.size()) + row_bytes * shape[0];
  // Rank 0's process number keeps two jobs that write the same file apart.
  std::string job = std::to_string(::getpid());
  world.broadcast(job, 0);
  std::optional<OutputFile> file;
  together(world, [&] {
    if (world.rank() == 0) file = OutputFile::create(path, total, job, header);
  });
  together(world, [&] {
    if (!file) file = OutputFile::join(path, job);
    const auto bytes = std::as_bytes(values);
    Index done = 0;
    for (const Run& run : problem.queries().positions(delivers.rows)) {
      const Index row = run.first - problem.shape().first_query();
      // Rows of a strided run lie apart in the file.
      const Index at_once = run.step == 1 ? run.count : 1;
      for (Index i = 0; i < run.count; i += at_once) {
        file->write_at(static_cast<Index>(header.size()) + (row + i * run.step) * row_bytes,
                       bytes.subspan(static_cast<std::size_t>(done * row_bytes),
                                     static_cast<std::size_t>(at_once * row_bytes)));
        done += at_once;
      }
    }
    file->sync();
  });
  return file;
}

/// The job from the signature check to the last file, on every rank.
class Job {
 public:
  Job(Communicator& world, const RunOptions& options) : world_(world), options_(options) {}

  Exit run() {
    settle();
    return options_.task.type == Type::f4 ? compute<float>() : compute<double>();
  }

 private:
  bool leads() const { return world_.rank() == 0; }

  void say(const std::string& text) const {
    if (!leads()) return;
    if (options_.quiet()) {
      std::fputs(text.c_str(), stderr);
    } else {
      write_text_file("-", text);
    }
  }

  /// Chooses, rehearses on rank 0, and reports before anything large happens.
  void settle() {
    const Task& task = options_.task;
    own_.host = this_host();
    own_.threads = choose_threads(options_, own_.host, world_);
    report_.machine =
        machine_of(task.machine, describes_all(task.machine)
                                     ? Machine{}
                                     : calibrate(world_, task.shape, task.type, own_.threads));
    report_.isa = chosen_isa().name;
    const auto hosts = world_.gather(encoded(own_));
    std::string chosen;  // strategy, partition, forecast
    together(world_, [&] {
      if (!leads()) return;
      choice_ = choose_for(task, world_.size(), report_.machine);
      const Plan plan = make_plan(*choice_.strategy, *choice_.problem);
      rehearsal_ = rehearse(*choice_.problem, plan, report_.machine);
      if (rehearsal_.fault) {
        throw Failure(Exit::internal, "the plan is refused: " + rehearsal_.fault->text());
      }
      for (const std::string& text : hosts) report_.ranks.push_back(decoded(text));
      require_memory(report_.ranks, *choice_.problem, plan, rehearsal_);
      chosen = fmt::format("{} {} {:a}", choice_.strategy->name, choice_.problem->partition(),
                           rehearsal_.forecast_seconds());
    });
    world_.broadcast(chosen, 0);
    std::istringstream words(chosen);
    std::string forecast;
    Task same = task;
    words >> same.wish.strategy >> same.wish.partition >> forecast;
    if (!leads()) choice_ = choose_for(same, world_.size(), report_.machine);
    // A rank with less work than its neighbours waits for them, and not in vain.
    constexpr double kPatience = 20;
    world_.set_deadline(
        std::max(options_.timeout, kPatience * std::strtod(forecast.c_str(), nullptr)));
    program_ = choice_.strategy->program(*choice_.problem, world_.rank());
    report_.task = &task;
    report_.choice = &choice_;
    report_.rehearsal = &rehearsal_;
    together(world_, [&] {
      if (leads()) say(heading(report_));
    });
  }

  template <class T>
  void load(Engine<Communicator>& engine) {
    const Problem& problem = *choice_.problem;
    for (const SlotId slot : program_.inputs) {
      const Block& block = program_.slots[static_cast<std::size_t>(slot)].block;
      const Partition& tokens = of_queries(block.kind) ? problem.queries() : problem.keys();
      options_.task.source.read(block.kind, tokens.positions(block.rows),
                                reinterpret_cast<T*>(engine.input(slot).data()));
    }
  }

  template <class T>
  Exit compute() {
    const Problem& problem = *choice_.problem;
    const Shape& shape = problem.shape();
    Progress progress(leads() && ::isatty(STDERR_FILENO) == 1, options_.warmup + options_.repeat,
                      program_.steps.size());
    int run = 0;
    std::optional<Engine<Communicator>> engine;
    std::vector<T> o;
    std::vector<T> lse;
    together(world_, [&] {
      const auto records =
          static_cast<std::size_t>(program_.result(Kind::O).block.row_count() * shape.query_heads);
      o.resize(records * static_cast<std::size_t>(shape.d_v));
      lse.resize(records);
    });
    engine.emplace(problem, program_, world_,
                   EngineOptions{.score = {.scale = options_.task.scale},
                                 .threads = own_.threads,
                                 .isa = nullptr,
                                 .checked = comm::checked_build(),
                                 .progress = [&](std::size_t step) { progress.at(run, step); }});
    together(world_, [&] { load<T>(*engine); });
    RunTimes last;
    for (; run < options_.warmup + options_.repeat; ++run) {
      world_.barrier();
      last = engine->run();
      if (run < options_.warmup) continue;
      own_.runs.push_back(last);
      own_.runs.back().steps.clear();
    }
    engine->result(std::span<T>(o), std::span<T>(lse));
    if (options_.check) {
      together(world_, [&] {});  // nobody checks while others still compute
      report_.verdict =
          verify<T>(world_, problem, program_.result(Kind::O).block, options_.task.source,
                    options_.task.scale, std::span<const T>(o), std::span<const T>(lse));
    }
    auto o_file = write_tensor<T>(world_, options_.out, problem, program_.result(Kind::O).block,
                                  {shape.queries, shape.query_heads, shape.d_v}, o);
    auto lse_file = write_tensor<T>(world_, options_.lse, problem, program_.result(Kind::O).block,
                                    {shape.queries, shape.query_heads}, lse);
    together(world_, [&] {  // both are complete, so both get their names
      if (leads() && o_file) o_file->commit();
      if (leads() && lse_file) lse_file->commit();
    });
    write_reports(last);
    return !report_.verdict || report_.verdict->passed() ? Exit::ok : Exit::check_failed;
  }

  void write_reports(const RunTimes& last) {
    const auto ranks = world_.gather(encoded(own_));
    std::vector<std::string> events;
    if (!options_.trace.empty()) events = world_.gather(trace_events(program_, last));
    together(world_, [&] {
      if (!leads()) return;
      report_.ranks.clear();
      for (const std::string& text : ranks) report_.ranks.push_back(decoded(text));
      if (!options_.json.empty()) write_text_file(options_.json, to_json(report_).dump(1) + "\n");
      if (!options_.csv.empty()) write_text_file(options_.csv, to_csv(report_));
      if (!options_.trace.empty()) write_text_file(options_.trace, trace_file(events));
      say(results(report_));
      if (report_.verdict) say(text(*report_.verdict) + "\n");
    });
  }

  Communicator& world_;
  const RunOptions& options_;
  RankReport own_;
  Choice choice_;
  Program program_;
  Rehearsal rehearsal_;  ///< rank 0's
  RunReport report_;
};

}  // namespace

Exit run_command(const std::vector<std::string>& given) {
  const std::vector<std::string> arguments = with_default_files(given);
  const po::options_description described = run_options();
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    std::ostringstream text;
    text << described;
    write_text_file("-", text.str());
    return Exit::ok;
  }
  comm::Session session;
  Communicator& world = session.world();
  const auto complain = [&](const std::string& what) {
    // Not fmt::print, which throws where nobody can read the line.
    std::fputs(fmt::format("[rank {}] dattn run: {}\n", world.rank(), what).c_str(), stderr);
    std::fflush(stderr);
  };
  try {
    std::optional<RunOptions> options;
    together(world, [&] {
      if (const auto complaint = comm::launch_complaint(
              world.size(), std::getenv("OMPI_COMM_WORLD_SIZE"), std::getenv("SLURM_NTASKS"))) {
        throw Failure(Exit::usage, *complaint);
      }
      options = read_options(parse("dattn run", described, arguments));
    });
    try {
      require_agreement(world, signature(*options, described, arguments));
    } catch (const Disagreement& e) {
      if (world.rank() == 0) complain(e.what());
      return Exit::usage;
    }
    world.set_deadline(options->timeout);
    return Job(world, *options).run();
  } catch (const JobFailure& e) {
    if (world.rank() == e.rank) complain(e.what());
    return e.code;
  } catch (const std::bad_alloc&) {
    complain("out of memory; use more ranks, or ask for less");
    comm::Session::abort(static_cast<int>(Exit::memory));
  } catch (const std::exception& e) {
    // This rank alone knows; whoever waits for it must not wait for ever.
    complain(e.what());
    const auto* step = dynamic_cast<const StepFailure*>(&e);
    const bool late =
        dynamic_cast<const comm::Timeout*>(&e) != nullptr || (step != nullptr && step->timed_out);
    comm::Session::abort(static_cast<int>(late ? Exit::timeout : Exit::internal));
  }
}

}  // namespace dattn
