#include "bench/trial.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <map>

#include "bench/contender.hpp"
#include "bench/ideal.hpp"
#include "bench/rest.hpp"
#include "launcher/calibrate.hpp"
#include "launcher/memory.hpp"
#include "launcher/rank_speeds.hpp"
#include "launcher/report.hpp"

namespace dattn {
namespace {

using comm::Communicator;
using nlohmann::json;

/// Seconds that a repeat may take before somebody who waits is told.
constexpr double kWorthSaying = 5;

/// A strategy as rank 0 has planned it.
struct Entry {
  std::string strategy;
  std::string partition;
  std::string refused;
  Index bytes = 0;  ///< that a rank holds for it, at most; an estimate from above

  // Not sent to the others:
  std::vector<double> forecasts = {};  ///< by pass
  std::vector<Index> memory = {};
  Index pairs = 0;
  std::string mesh = {};
  int prefetch = 0;
};

/// What all ranks have to know before they measure.
struct Agenda {
  std::vector<Entry> entries;
  bool at_once = true;  ///< all engines fit into memory together
  bool ideal = true;    ///< and the ideals beside them
};

Wish wish_for(const Task& task, const Entry& entry, int ranks) {
  Wish wish = task.wish;
  wish.strategy = entry.strategy;
  if (!entry.partition.empty()) wish.partition = entry.partition;
  wish.ranks = ranks;
  // The engines of both passes are there all the time, so keeping takes less memory than sending
  // again; what they take together is limited below.
  wish.memory = 0;
  return wish;
}

/// The planner's own choice, proved and priced; or the refusal.
void plan(const Task& task, const Machine& machine, int ranks, int threads, Entry& entry) {
  Choice choice;
  try {
    choice = choose(wish_for(task, entry, ranks), task.shape, task.mask, task.type, machine);
  } catch (const std::invalid_argument& e) {
    entry.refused = e.what();
    // Its row begins with its name.
    if (entry.refused.starts_with(entry.strategy + " ")) {
      entry.refused.erase(0, entry.strategy.size() + 1);
    }
    return;
  }
  entry.partition = choice.problem->partition();
  entry.mesh = choice.problem->mesh().text();
  entry.prefetch = choice.problem->prefetch();
  for (const auto& [proved, rehearsal] :
       plan_passes(*choice.strategy, *choice.problem, task.passes(), machine)) {
    if (rehearsal.fault) {
      entry.refused = "the plan is refused: " + rehearsal.fault->text();
      return;
    }
    entry.forecasts.push_back(rehearsal.forecast_seconds());
    entry.memory.push_back(*std::max_element(rehearsal.memory_bytes.begin(),  //
                                             rehearsal.memory_bytes.end()));
    entry.pairs = rehearsal.pairs_total();
    Index kernels = 0;
    for (const Program& program : proved) {
      kernels = std::max(kernels, kernel_bytes(*choice.problem, program, threads));
    }
    entry.bytes += kernels + entry.memory.back() -
                   *std::min_element(rehearsal.kept_bytes.begin(),  //
                                     rehearsal.kept_bytes.end());
  }
}

/// On one rank: what to measure, and how much of it at a time.
Agenda make_agenda(const Task& task, const Machine& machine, int ranks,
                   const TrialOptions& options) {
  Agenda agenda;
  Index sum = 0;
  Index most = 0;
  std::map<std::string, Index> ideals;  // by partition
  const Index limit = options.bytes_a_rank;
  for (const std::string& strategy : options.strategies) {
    Entry& entry = agenda.entries.emplace_back();
    entry.strategy = strategy;
    plan(task, machine, ranks, options.threads, entry);
    if (!entry.refused.empty()) continue;
    if (limit > 0 && entry.bytes > limit) {
      entry.refused = fmt::format("needs {} a rank, which has {}; fewer tokens or ranks a host",
                                  in_bytes(entry.bytes), in_bytes(limit));
      continue;
    }
    sum += entry.bytes;
    most = std::max(most, entry.bytes);
    if (limit == 0 || ideals.contains(entry.partition)) continue;
    const Problem problem(task.shape, task.mask, line(ranks), entry.partition, task.type,
                          task.wish.wire, task.wish.speeds);
    for (int r = 0; r < ranks; ++r) {
      Index& bytes = ideals[entry.partition];
      bytes = std::max(bytes, ideal_bytes(task, problem, r, options.threads));
    }
  }
  if (limit == 0) return agenda;
  Index ideal = ideal_keys_bytes(task, task.shape.keys);
  for (const auto& [partition, bytes] : ideals) ideal += bytes;
  agenda.ideal = ideal + most <= limit;
  agenda.at_once = (agenda.ideal ? ideal : 0) + sum <= limit;
  return agenda;
}

/// Rank 0's agenda, everywhere; what only rank 0 needs stays there.
void share(Communicator& ranks, Agenda& agenda) {
  json j{{"at_once", agenda.at_once}, {"ideal", agenda.ideal}, {"entries", json::array()}};
  for (const Entry& e : agenda.entries) {
    j["entries"].push_back({e.strategy, e.partition, e.refused});
  }
  std::string text = j.dump();
  ranks.broadcast(text, 0);
  if (ranks.rank() == 0) return;
  j = json::parse(text);
  agenda.at_once = j.at("at_once");
  agenda.ideal = j.at("ideal");
  for (const json& e : j.at("entries")) agenda.entries.push_back({e.at(0), e.at(1), e.at(2)});
}

/// Ideal seconds of each pass of a task in one repeat.
struct IdealTimes {
  std::vector<double> busy, slowest, alone;
};

/// The Ideals of one partition over all ranks.
template <class E>
class Ideals {
 public:
  Ideals(Communicator& ranks, const Task& task, const Problem& problem, const TrialOptions& options,
         IdealKeys<E>& keys)
      : ranks_(ranks),
        alone_(options.alone),
        mine_(task, problem, ranks.rank(), options.threads, keys) {
    std::array<Index, 1> total{mine_.area()};
    std::array<Index, 1> most = total;
    ranks_.all_reduce_sum(total);
    ranks_.all_reduce_max(most);
    std::array<Index, 1> first{mine_.area() == most[0] ? ranks_.rank() : ranks_.size()};
    ranks_.all_reduce_min(first);
    fullest_ = static_cast<int>(first[0]);
    share_ = static_cast<double>(total[0]) / ranks_.size();
  }

  void run(Pass pass, IdealTimes& times) {
    ranks_.barrier();
    std::array<double, 1> seconds{mine_.run(pass)};
    const auto area = static_cast<double>(mine_.area());
    std::array<double, 1> slowest{area > 0 ? seconds[0] * share_ / area : 0};
    ranks_.all_reduce_sum(seconds);
    ranks_.all_reduce_max(slowest);
    // Over the mean area, since all areas together are the whole.
    times.busy.push_back(seconds[0] / ranks_.size());
    times.slowest.push_back(slowest[0]);
    if (ranks_.size() == 1) times.alone.push_back(times.busy.back());
    if (ranks_.size() == 1 || !alone_) return;
    rest_until_all(ranks_);
    std::array<double, 1> alone{0};
    if (ranks_.rank() == fullest_ && mine_.area() > 0) {
      alone[0] = mine_.run(pass) * share_ / area;
    }
    rest_until_all(ranks_);
    ranks_.all_reduce_max(alone);
    times.alone.push_back(alone[0]);
  }

 private:
  Communicator& ranks_;
  bool alone_;  ///< also one rank alone
  Ideal<E> mine_;
  int fullest_ = 0;   ///< the rank with the largest area
  double share_ = 0;  ///< the mean area
};

/// Collective: one run over all ranks. Seconds are the slowest rank's.
Sample sample_of(Communicator& ranks, const RunTimes& mine) {
  std::array<double, 2> most{mine.seconds, static_cast<double>(mine.bytes_sent)};
  std::array<double, 4> sum{mine.compute, mine.wait, mine.hidden,
                            static_cast<double>(mine.messages)};
  ranks.all_reduce_max(most);
  ranks.all_reduce_sum(sum);
  const double n = ranks.size();
  return {most[0], sum[0] / n, sum[1] / n, sum[2] / n, most[1], sum[3]};
}

/// Samples of one contender: by pass, and of all passes together where there are several.
using Samples = std::vector<std::vector<Sample>>;

/// Collective: the passes of a contender, one after the other.
template <class E>
void run_passes(Communicator& ranks, Contender<E>& contender, const std::vector<Pass>& passes,
                const IdealTimes* ideal, Samples& samples) {
  RunTimes sum;
  Sample both;
  for (std::size_t i = 0; i < passes.size(); ++i) {
    ranks.barrier();
    const RunTimes mine = contender.run(passes[i]);
    Sample sample = sample_of(ranks, mine);
    if (ideal != nullptr) {
      sample.ideal_busy = ideal->busy[i];
      sample.ideal_slowest = ideal->slowest[i];
      if (!ideal->alone.empty()) sample.ideal_alone = ideal->alone[i];
    }
    samples[i].push_back(sample);
    sum.bytes_sent += mine.bytes_sent;
    both.seconds += sample.seconds;
    both.compute += sample.compute;
    both.exposed += sample.exposed;
    both.hidden += sample.hidden;
    both.messages += sample.messages;
    both.ideal_busy += sample.ideal_busy;
    both.ideal_slowest += sample.ideal_slowest;
    both.ideal_alone += sample.ideal_alone;
  }
  if (passes.size() == 1) return;
  both.bytes = sample_of(ranks, sum).bytes;  // the rank that sends most in both together
  samples.back().push_back(both);
}

/// Collective: measures the entries `group`, all in place at the same time; each repeat runs the
/// ideals, then each entry. `seconds` limits this group as TrialOptions say.
template <class E>
void measure(Communicator& ranks, const Task& task, const TrialOptions& options,
             const Agenda& agenda, IdealKeys<E>* keys, const std::vector<std::size_t>& group,
             double seconds, std::vector<Samples>& samples) {
  std::map<std::string, std::unique_ptr<Ideals<E>>> ideals;  // by partition
  std::vector<std::unique_ptr<Contender<E>>> contenders;
  for (const std::size_t i : group) {
    const Entry& entry = agenda.entries[i];
    const Choice choice =
        choose(wish_for(task, entry, ranks.size()), task.shape, task.mask, task.type, {});
    contenders.push_back(std::make_unique<Contender<E>>(task, choice, ranks, options.threads));
    if (keys == nullptr || ideals.contains(entry.partition)) continue;
    ideals[entry.partition] =
        std::make_unique<Ideals<E>>(ranks, task, *choice.problem, options, *keys);
  }
  const std::vector<Pass> passes = task.passes();
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  std::array<double, 1> spent{0};  // as the slowest rank has it
  double last = 0;
  for (int repeat = -1; repeat < options.repeats; ++repeat) {
    if (seconds > 0 && repeat >= 0 && spent[0] + last > seconds) break;
    std::map<std::string, IdealTimes> times;
    for (const auto& [partition, ideal] : ideals) {
      for (const Pass pass : passes) ideal->run(pass, times[partition]);
    }
    for (std::size_t c = 0; c < group.size(); ++c) {
      Samples& mine = samples[group[c]];
      const IdealTimes* ideal =
          keys == nullptr ? nullptr : &times.at(agenda.entries[group[c]].partition);
      run_passes(ranks, *contenders[c], passes, ideal, mine);
    }
    const double before = spent[0];
    spent[0] = std::chrono::duration<double>(Clock::now() - begin).count();
    ranks.all_reduce_max(spent);
    last = spent[0] - before;
    // The first one warms up, and counts only where there is no time for another.
    const bool only = seconds > 0 && spent[0] + last > seconds;
    for (const std::size_t i : group) {
      if (repeat >= 0 || only) break;
      for (auto& pass : samples[i]) pass.clear();
    }
    if (repeat < 0 && ranks.rank() == 0 && last > kWorthSaying) {
      fmt::print(stderr, "{} ranks, {} strategies: about {:.0f} s a repeat\n", ranks.size(),
                 group.size(), last);
    }
  }
}

/// What is told of entries once they are measured.
using Told =
    std::function<void(const std::vector<std::size_t>& group, const std::vector<Samples>& samples)>;

template <class E>
std::vector<Samples> measure_all(Communicator& ranks, const Task& task, const TrialOptions& options,
                                 const Agenda& agenda, const Told& told) {
  const std::size_t lines = task.passes().size() == 1 ? 1 : task.passes().size() + 1;
  std::vector<Samples> samples(agenda.entries.size(), Samples(lines));
  std::vector<std::vector<std::size_t>> groups;
  for (std::size_t i = 0; i < agenda.entries.size(); ++i) {
    if (!agenda.entries[i].refused.empty()) continue;
    if (groups.empty() || !agenda.at_once) groups.emplace_back();
    groups.back().push_back(i);
  }
  std::unique_ptr<IdealKeys<E>> keys;
  if (agenda.ideal && !groups.empty())
    keys = std::make_unique<IdealKeys<E>>(task, all_keys(task), options.threads);
  for (const auto& group : groups) {
    measure<E>(ranks, task, options, agenda, keys.get(), group,
               options.seconds / static_cast<double>(groups.size()), samples);
    told(group, samples);
  }
  return samples;
}

/// The rows of one entry: each pass, then all passes together.
void add_rows(const Task& task, int ranks, int threads, const Entry& entry, const Samples& samples,
              std::vector<Row>& rows) {
  Row row;
  row.strategy = entry.strategy;
  row.partition = entry.partition.empty() ? task.wish.partition : entry.partition;
  row.mesh = entry.mesh;
  row.prefetch = entry.prefetch;
  row.ranks = ranks;
  row.threads = threads;
  row.shape = task.shape;
  row.mask = task.mask_words;
  row.refused = entry.refused;
  const std::vector<Pass> passes = task.passes();
  if (!entry.refused.empty()) {
    row.pass = passes.size() == 1 ? name_of(passes.front()) : "forward+backward";
    rows.push_back(row);
    return;
  }
  Row both = row;
  both.pass = "forward+backward";
  for (std::size_t i = 0; i < passes.size(); ++i) {
    row.pass = name_of(passes[i]);
    row.forecast = entry.forecasts[i];
    row.memory = entry.memory[i];
    row.flops = static_cast<double>(entry.pairs) * (passes[i] == Pass::forward
                                                        ? task.shape.flops_per_pair()
                                                        : task.shape.backward_flops_per_pair());
    row.measured(samples[i]);
    rows.push_back(row);
    both.forecast += row.forecast;
    both.memory = std::max(both.memory, row.memory);
    both.flops += row.flops;
  }
  if (passes.size() == 1) return;
  both.measured(samples.back());
  rows.push_back(both);
}

}  // namespace

Trial try_strategies(Communicator& ranks, const Task& asked, const TrialOptions& options) {
  Trial trial;
  Task task = asked;
  task.wish.speeds = speeds_of(ranks, asked, options.threads);
  trial.speeds = task.wish.speeds;
  trial.machine = machine_of(
      task.machine, calibrate(ranks, task.shape, task.type, options.threads, task.wish.gradients,
                              {}, task.wish.speeds, task.scoring.score));
  Agenda agenda;
  if (ranks.rank() == 0) agenda = make_agenda(task, trial.machine, ranks.size(), options);
  rest_until_all(ranks);
  share(ranks, agenda);
  const auto measure = task.type == Type::bf16 ? measure_all<BFloat16>
                       : task.type == Type::f4 ? measure_all<float>
                                               : measure_all<double>;
  // Strategies that take turns may take long, and somebody may end the job before the last.
  const auto tell = [&](const std::vector<std::size_t>& group, const std::vector<Samples>& known) {
    if (ranks.rank() != 0 || agenda.at_once) return;
    std::vector<Row> rows;
    for (const std::size_t i : group) {
      add_rows(task, ranks.size(), options.threads, agenda.entries[i], known[i], rows);
    }
    fmt::print(stderr, "{}", to_table(rows));
  };
  const std::vector<Samples> samples = measure(ranks, task, options, agenda, tell);
  if (ranks.rank() != 0) return trial;
  for (std::size_t i = 0; i < agenda.entries.size(); ++i) {
    add_rows(task, ranks.size(), options.threads, agenda.entries[i], samples[i], trial.rows);
  }
  if (!agenda.ideal) {
    trial.note = fmt::format(
        "the ideal is left out: all keys of the problem in each rank's memory "
        "are too much beside {} a rank",
        in_bytes(options.bytes_a_rank));
  } else if (!agenda.at_once) {
    trial.note = "strategies took their repeats in turn: together they do not fit into memory";
  }
  return trial;
}

}  // namespace dattn
