#include "launcher/job.hpp"

#include <fmt/format.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <tuple>

#include "launcher/calibrate.hpp"
#include "launcher/digests.hpp"
#include "launcher/links.hpp"
#include "launcher/manifest.hpp"
#include "launcher/memory.hpp"
#include "launcher/output_file.hpp"
#include "launcher/rank_speeds.hpp"
#include "launcher/remedy.hpp"
#include "launcher/report.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"
#include "launcher/watch.hpp"
#include "parallel/stats.hpp"

namespace dattn {
namespace {

using comm::Communicator;

/// Whether --machine leaves nothing to measure; the run then sends nothing but its plan.
bool describes_all(const std::string& machine) {
  const std::string words = "," + machine;
  return words.find(",latency=") != std::string::npos &&
         words.find(",bandwidth=") != std::string::npos &&
         words.find(",rate=") != std::string::npos;
}

int choose_threads(const RunOptions& options, const Host& host, Communicator& world) {
  // Every rank takes part: OMP_NUM_THREADS may be set for some of them only.
  const int threads = threads_of(world, host);
  return options.threads > 0 ? options.threads : threads;
}

/// One line on a terminal, now and then, while long work goes on. Rank 0 only.
class Progress {
 public:
  Progress(bool wanted, std::string_view pass, int runs, std::size_t steps)
      : wanted_(wanted), pass_(pass), runs_(runs), steps_(steps) {}
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
    fmt::print(stderr, "\r\033[K{} run {} of {}, step {} of {}", pass_, run + 1, runs_, step + 1,
               steps_);
    std::fflush(stderr);
  }

 private:
  bool wanted_;
  std::string_view pass_;
  int runs_;
  std::size_t steps_;
  bool shown_ = false;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point last_ = start_;
};

template <class T>
constexpr NpyHeader::Type npy_type = sizeof(T) == 4 ? NpyHeader::Type::f4 : NpyHeader::Type::f8;

/// Writes this rank's rows of a tensor [tokens, ...] into the file that all ranks write together.
/// Rank 0 has to commit it.
template <class T>
std::optional<OutputFile> write_tensor(Communicator& world, const std::string& path,
                                       const Problem& problem, const Block& delivers,
                                       std::vector<std::int64_t> shape,
                                       const std::vector<T>& values) {
  if (path.empty()) return {};
  const std::string header = npy_header(npy_type<T>, shape);
  Index row_bytes = sizeof(T);
  for (std::size_t i = 1; i < shape.size(); ++i) row_bytes *= shape[i];
  const Index total = static_cast<Index>(header.size()) + row_bytes * shape[0];
  const std::string job = agree_on_outputs(world, {path});
  std::optional<OutputFile> file;
  together(world, [&] {
    if (world.rank() == 0) file = OutputFile::create(path, total, job, header);
  });
  together(world, [&] {
    if (!file) file = OutputFile::join(path, job);
    const auto bytes = std::as_bytes(std::span(values));
    const bool query = of_queries(delivers.kind);
    const Index first = query ? problem.shape().first_query() : 0;
    Index done = 0;
    for (const Run& run : (query ? problem.queries() : problem.keys()).positions(delivers.rows)) {
      const Index row = run.first - first;
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

/// The job, on every rank.
class Job {
 public:
  Job(Communicator& world, comm::Watchdog& watchdog, const RunOptions& options)
      : world_(world),
        watchdog_(watchdog),
        windows_(world, {.on = options.windows}),
        options_(options),
        scoring_(options.task.scoring) {}

  Exit run() {
    settle();
    together(world_, [&] { scoring_.key_weights = scoring_.key_weights_file.read(); });
    switch (options_.task.type) {
      case Type::bf16:
        return compute<BFloat16>();
      case Type::f4:
        return compute<float>();
      default:
        return compute<double>();
    }
  }

 private:
  bool leads() const { return world_.rank() == 0; }

  void say(const std::string& text) const {
    if (!leads() || options_.report) return;
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
    windows_.copy_with(own_.threads);
    Task at = task;
    const Hosts found = hosts_of(world_);
    together(world_, [&] { at.wish.hosts = hosts_from(task.hosts, world_.size(), found); });
    world_.phase("calibration");
    at.wish.speeds = speeds_of(world_, task, own_.threads);
    report_.machine =
        machine_of(task.machine,
                   describes_all(task.machine)
                       ? Machine{.name = task.machine_name}
                       : calibrate(world_, task.shape, task.type, own_.threads, task.wish.gradients,
                                   at.wish.hosts, at.wish.speeds, task.scoring.score));
    report_.isa = chosen_isa().name;
    report_.verify_wire = options_.verify_wire;
    own_.host.limits = memory_limits();  // what calibration keeps is taken already
    began_with_ = begin_peak();
    world_.phase("planning");
    const auto hosts = world_.gather(encoded(own_));
    for (const std::string& trouble : world_.gather(windows_.trouble())) {
      if (report_.windows_trouble.empty()) report_.windows_trouble = trouble;
    }
    // Strategy, partition, mesh, whether it keeps and relays, stages ahead, forecast.
    std::string chosen;
    together(world_, [&] {
      if (!leads()) return;
      for (const std::string& text : hosts) report_.ranks.push_back(decoded(text));
      Setting setting{at, {}, options_.check, rooms_of(report_.ranks), options_.verify_wire};
      for (const RankReport& rank : report_.ranks) setting.threads.push_back(rank.threads);
      choice_ = choose_within(setting, report_.machine, !options_.report);
      double forecast = 0;
      std::vector<Planned> passes =
          plan_passes(*choice_.strategy, *choice_.problem, task.passes(), report_.machine);
      report_.slot_bytes = slot_bytes(*choice_.problem, passes);
      report_.memory = memory_json(needs_of(*choice_.problem, passes, setting.beside()),
                                   setting.rooms, task.wish.memory);
      for (Planned& pass : passes) {
        if (pass.rehearsal.fault) {
          throw Failure(Exit::internal, "the plan is refused: " + pass.rehearsal.fault->text());
        }
        forecast = std::max(forecast, pass.rehearsal.forecast_seconds());
        report_.rehearsals.push_back(std::move(pass.rehearsal));
      }
      chosen = fmt::format("{} {} {} {:d} {:d} {} {:a}", choice_.strategy->name,
                           choice_.problem->partition(), choice_.problem->mesh().text(),
                           choice_.problem->keeps(), choice_.problem->relays(),
                           choice_.problem->prefetch(), forecast);
    });
    world_.broadcast(chosen, 0);
    std::istringstream words(chosen);
    std::string forecast, mesh;
    Task same = at;
    same.wish.memory = 0;  // rank 0 has seen to it
    words >> same.wish.strategy >> same.wish.partition >> mesh >> same.wish.keeps.emplace() >>
        same.wish.relays.emplace() >> same.wish.prefetch.emplace() >> forecast;
    same.wish.mesh = parse_mesh(mesh).extents;
    if (!leads()) choice_ = choose_for(same, world_.size(), report_.machine);
    // A rank with less work than its neighbours waits for them, and not in vain; an all-reduce does
    // not say how far it is.
    constexpr double kPatience = 20;
    if (options_.watch.seconds > 0) {
      watchdog_.set_seconds(
          std::max(options_.watch.seconds, kPatience * std::strtod(forecast.c_str(), nullptr)));
    }
    for (const Pass pass : task.passes()) {
      programs_.push_back(make_program(*choice_.strategy, *choice_.problem, world_.rank(), pass));
    }
    report_.task = &task;
    report_.choice = &choice_;
    together(world_, [&] {
      if (leads()) say(heading(report_));
    });
  }

  const Block& block(const Program& program, SlotId slot) const {
    return program.slots[static_cast<std::size_t>(slot)].block;
  }
  const Block& delivers(Kind kind) const {
    return programs_[kind == Kind::O ? 0 : 1].result(kind).block;
  }
  const Partition& tokens_of(Kind kind) const {
    return of_queries(kind) ? choice_.problem->queries() : choice_.problem->keys();
  }

  template <class T>
  void read(Kind kind, const Ranges& rows, T* to) const {
    options_.task.source.read(kind, tokens_of(kind).positions(rows), to, own_.threads);
  }

  /// What a rank has at its end, dense.
  template <class T>
  struct Results {
    std::vector<T> o, lse, dq, dk, dv;

    std::vector<T>& of(Kind kind) { return kind == Kind::dQ ? dq : kind == Kind::dK ? dk : dv; }
  };

  /// Fills the input slots with elements of type E; Stats are of what the forward pass has left,
  /// and what it has kept stays where it is.
  template <class E>
  void load(Engine<comm::Windows>& engine, const Program& program,
            const Results<SumOf<E>>& results) {
    const Shape& shape = choice_.problem->shape();
    for (const SlotId slot : program.inputs) {
      const Block& input = block(program, slot);
      const auto kept = forward_ ? kept_slot(programs_[0], input) : std::nullopt;
      if (kept) {
        engine.bind(slot, forward_->kept(*kept));
        continue;
      }
      std::byte* to = engine.input(slot).data();
      if (input.kind != Kind::Stats) {
        read(input.kind, input.rows, reinterpret_cast<E*>(to));
        continue;
      }
      const Index rows = input.row_count();
      const Index heads = shape.query_heads;
      std::vector<E> d_o(static_cast<std::size_t>(rows * heads * shape.d_v));
      read(Kind::dO, input.rows, d_o.data());
      fill_stats<E>({results.o.data(), rows, heads, shape.d_v}, results.lse,
                    {d_o.data(), rows, heads, shape.d_v},
                    {reinterpret_cast<SumOf<E>*>(to), rows, heads, 2}, own_.threads);
    }
  }

  /// Runs a pass as often as was asked for; gives the times of the last run.
  template <class E>
  RunTimes run_pass(const Program& program, Results<SumOf<E>>& results,
                    std::vector<RunTimes>& timed) {
    using T = SumOf<E>;
    const int runs = options_.warmup + options_.repeat;
    Progress progress(leads() && ::isatty(STDERR_FILENO) == 1, name_of(program.pass), runs,
                      program.steps.size());
    int run = 0;
    auto made = std::make_unique<Engine<comm::Windows>>(
        *choice_.problem, program, windows_,
        EngineOptions{
            .score = scoring_.score,
            .sinks = scoring_.sinks,
            .key_weights = scoring_.key_weights,
            .threads = own_.threads,
            .isa = nullptr,
            .checked = comm::checked_build(),
            .verify_wire = options_.verify_wire,
            .progress = noted(world_, [&](std::size_t step) { progress.at(run, step); })});
    Engine<comm::Windows>& engine = *made;
    world_.phase("inputs");
    together(world_, [&] { load<E>(engine, program, results); });
    note_program(world_, program);
    world_.phase(program.pass == Pass::forward ? "forward pass" : "backward pass");
    RunTimes last;
    for (; run < runs; ++run) {
      world_.barrier();
      last = engine.run();
      if (run < options_.warmup) continue;
      timed.push_back(last);
      timed.back().steps.clear();
    }
    if (program.pass == Pass::forward) {
      engine.result(std::span<T>(results.o), std::span<T>(results.lse));
    } else {
      for (const Result& result : program.results) {
        engine.gradient(result.block.kind, std::span<T>(results.of(result.block.kind)));
      }
    }
    forward_.reset();
    if (program.pass == Pass::forward && choice_.problem->keeps()) forward_ = std::move(made);
    return last;
  }

  template <class E>
  Exit compute() {
    using T = SumOf<E>;
    const Problem& problem = *choice_.problem;
    const Shape& shape = problem.shape();
    const bool gradients = options_.task.wish.gradients;
    Results<T> results;
    together(world_, [&] {
      results.lse.resize(
          static_cast<std::size_t>(delivers(Kind::O).row_count() * shape.query_heads));
      results.o.resize(results.lse.size() * static_cast<std::size_t>(shape.d_v));
    });
    std::vector<RunTimes> last{run_pass<E>(programs_[0], results, own_.runs)};
    together(world_, [&] {
      if (!gradients) return;
      for (const Kind kind : result_kinds(Pass::backward)) {
        results.of(kind).resize(static_cast<std::size_t>(
            delivers(kind).row_count() * heads_of(kind, shape) * dim_of(kind, shape)));
      }
    });
    if (gradients) last.push_back(run_pass<E>(programs_[1], results, own_.backward_runs));
    if (options_.check) {
      world_.phase("check");
      together(world_, [&] {});  // nobody checks while others still compute
      const Source& source = options_.task.source;
      report_.verdict =
          verify<T>(world_, problem, delivers(Kind::O), source, scoring_, results.o, results.lse);
      if (gradients) {
        report_.gradient_verdict = verify_gradients<T>(
            world_, problem, delivers(Kind::O), delivers(Kind::dK), source, scoring_,
            {results.o, results.lse, results.dq, results.dk, results.dv});
      }
    }
    own_.took = peak_bytes() - began_with_;
    world_.phase("output");
    // Files get their names when all are complete; the manifest is last.
    Manifest manifest(options_.manifest);
    manifest.add_inputs(world_, {{"q", options_.q},
                                 {"k", options_.k},
                                 {"v", options_.v},
                                 {"grad", options_.grad},
                                 {"relative-bias", scoring_.bias_file},
                                 {"key-weights", scoring_.key_weights_file.path()}});
    std::vector<std::optional<OutputFile>> files;
    const auto write = [&](const char* option, const std::string& path, Kind kind,
                           const std::vector<std::int64_t>& sizes, const std::vector<T>& values) {
      files.push_back(write_tensor<T>(world_, path, problem, delivers(kind), sizes, values));
      Runs rows = tokens_of(kind).positions(delivers(kind).rows);
      for (Run& run : rows) run.first -= of_queries(kind) ? shape.first_query() : 0;
      manifest.add_output(world_, option, path, npy_type<T>, sizes, rows,
                          std::as_bytes(std::span(values)));
    };
    write("out", options_.out, Kind::O, {shape.queries, shape.query_heads, shape.d_v}, results.o);
    write("lse", options_.lse, Kind::O, {shape.queries, shape.query_heads}, results.lse);
    for (const auto& [option, kind, path] :
         {std::tuple{"dq", Kind::dQ, &options_.dq}, std::tuple{"dk", Kind::dK, &options_.dk},
          std::tuple{"dv", Kind::dV, &options_.dv}}) {
      if (!gradients) continue;
      write(option, *path, kind,
            {of_queries(kind) ? shape.queries : shape.keys, heads_of(kind, shape),
             dim_of(kind, shape)},
            results.of(kind));
    }
    files.push_back(manifest.write(world_));
    together(world_, [&] {
      if (!leads()) return;
      for (auto& file : files) {
        if (file) file->commit();
      }
    });
    write_reports(last);
    const bool right = (!report_.verdict || report_.verdict->passed()) &&
                       (!report_.gradient_verdict || report_.gradient_verdict->passed());
    return right ? Exit::ok : Exit::check_failed;
  }

  /// `last`: times of the last run of each pass.
  void write_reports(const std::vector<RunTimes>& last) {
    world_.phase("reports");
    agree_on_outputs(world_, {options_.json, options_.csv, options_.trace});
    const auto ranks = world_.gather(encoded(own_));
    std::vector<std::string> events;
    if (!options_.trace.empty()) {
      double from = 0;  // a pass is drawn behind the one before
      for (std::size_t i = 0; i < last.size(); ++i) {
        for (std::string& text : world_.gather(trace_events(programs_[i], last[i], from))) {
          events.push_back(std::move(text));
        }
        std::array<double, 1> seconds{last[i].seconds};
        world_.all_reduce_max(seconds);
        from += seconds[0];
      }
    }
    together(world_, [&] {
      if (!leads()) return;
      report_.ranks.clear();
      for (const std::string& text : ranks) report_.ranks.push_back(decoded(text));
      if (options_.report) options_.report(report_);
      if (!options_.json.empty()) write_text_file(options_.json, to_json(report_).dump(1) + "\n");
      if (!options_.csv.empty()) write_text_file(options_.csv, to_csv(report_));
      if (!options_.trace.empty()) write_text_file(options_.trace, trace_file(events));
      say(results(report_));
      if (report_.verdict) say(text(*report_.verdict) + "\n");
      if (report_.gradient_verdict) say(text(*report_.gradient_verdict) + "\n");
    });
  }

  Communicator& world_;
  comm::Watchdog& watchdog_;
  comm::Windows windows_;  ///< for the engines' messages
  const RunOptions& options_;
  Scoring scoring_;  ///< with what its files hold
  RankReport own_;
  Index began_with_ = 0;  ///< bytes of memory, before anything of the problem
  Choice choice_;
  std::vector<Program> programs_;  ///< by pass
  /// The forward pass's, until the backward pass is over, where the Problem keeps.
  std::unique_ptr<Engine<comm::Windows>> forward_;
  RunReport report_;  ///< rank 0's, but for the choice
};

}  // namespace

RunOptions read_work(const boost::program_options::variables_map& values) {
  RunOptions options;
  options.task = make_task(values);
  constexpr Index kMostThreads = 1024;
  constexpr Index kMostRuns = 1000000;
  options.threads = values.count("threads") != 0
                        ? at_most("threads", values["threads"].as<Positive>().value, kMostThreads)
                        : threads_from_environment();
  options.repeat = at_most("repeat", values["repeat"].as<Positive>().value, kMostRuns);
  options.warmup = at_most("warmup", values["warmup"].as<Count>().value, kMostRuns);
  options.watch = read_watch(values);
  options.check = values.count("check") != 0;
  options.verify_wire = verifies_wire(values);
  return options;
}

Exit run_job(Communicator& world, comm::Watchdog& watchdog, const RunOptions& options) {
  return Job(world, watchdog, options).run();
}

}  // namespace dattn
