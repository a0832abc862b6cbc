#include "bench/overlap.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <thread>

#include "bench/contender.hpp"
#include "bench/rows.hpp"
#include "launcher/calibrate.hpp"
#include "launcher/report.hpp"
#include "parallel/rehearse.hpp"

namespace dattn {
namespace {

using comm::Communicator;

constexpr RunParts kKernels{.messages = false};
constexpr RunParts kMessages{.kernels = false};
constexpr RunParts kBoth{};
constexpr RunParts kWithoutPolling{.polling = false};

/// One run over all ranks.
struct Run {
  double seconds = 0;  ///< of the slowest rank
  double wait = 0;     ///< mean of the ranks
};

/// One repeat: the parts by themselves, and together.
struct Repeat {
  double compute = 0, comm = 0;
  Run both, without_polling;
  bool steady = true;

  double hidden(const Run& run) const { return 1 - (run.seconds - compute) / comm; }
};

template <class E>
class Overlap {
 public:
  Overlap(Communicator& ranks, const Task& task, const Choice& choice, Pass pass,
          const OverlapOptions& options, Contender<E>& contender)
      : ranks_(ranks),
        task_(task),
        choice_(choice),
        pass_(pass),
        options_(options),
        contender_(contender) {}

  /// The two rows of the pass: polling, and not.
  std::vector<OverlapRow> measure() {
    OverlapRow row;
    row.rate = settle_rate();
    std::vector<Repeat> repeats, unsteady;
    constexpr int kTries = 3;  // for each repeat that a busy machine spoils
    for (int i = 0; i < kTries * options_.repeats; ++i) {
      const Repeat one = repeat();
      (one.steady ? repeats : unsteady).push_back(one);
      if (std::ssize(repeats) == options_.repeats) break;
    }
    row.steady = std::ssize(repeats) == options_.repeats;
    if (!row.steady) repeats.insert(repeats.end(), unsteady.begin(), unsteady.end());
    describe(row, repeats);
    std::vector<OverlapRow> rows;
    for (const bool polling : {true, false}) {
      row.polling = polling;
      summarise(row, repeats, polling ? &Repeat::both : &Repeat::without_polling);
      rows.push_back(row);
    }
    return rows;
  }

 private:
  Run run(const RunParts& parts) {
    std::this_thread::sleep_for(std::chrono::duration<double>(options_.rest * last_.seconds));
    ranks_.barrier();
    const RunTimes mine = contender_.run(pass_, parts);
    last_ = mine;
    std::array<double, 1> most{mine.seconds};
    std::array<double, 1> sum{mine.wait};
    ranks_.all_reduce_max(most);
    ranks_.all_reduce_sum(sum);
    return {most[0], sum[0] / ranks_.size()};
  }

  Repeat repeat() {
    Repeat one;
    const double before = run(kKernels).seconds;
    one.comm = run(kMessages).seconds;
    one.both = run(kBoth);
    one.without_polling = run(kWithoutPolling);
    const double after = run(kKernels).seconds;
    one.compute = (before + after) / 2;
    constexpr double kSteady = 0.03;
    one.steady = std::abs(after - before) < kSteady * one.compute;
    return one;
  }

  /// Of each rank the bytes and messages of a run; here of the rank that sends most.
  std::array<double, 2> sent() {
    std::array<double, 2> most{static_cast<double>(last_.bytes_sent),
                               static_cast<double>(last_.messages)};
    ranks_.all_reduce_max(most);
    return most;
  }

  /// Sets the link so that messages take `ratio` of the kernels' time, step for step: a plan of P
  /// ranks has P steps of kernels and P - 1 of messages. What counts is the time that the messages
  /// take when nothing else goes on, since queues and headers have their part in it.
  double settle_rate() {
    run(kBoth);
    const double bytes = sent()[0];
    if (!options_.set_rate || bytes == 0) return 0;
    std::vector<double> seconds;
    for (int i = 0; i < 3; ++i) seconds.push_back(run(kKernels).seconds);
    const double target = options_.ratio * median(seconds) * steps_with_messages();
    double rate = bytes / target;
    constexpr int kRounds = 4;
    for (int i = 0; i < kRounds; ++i) {
      options_.set_rate(rate);
      run(kMessages);  // what lay in the link's queues is gone
      seconds.clear();
      for (int j = 0; j < 3; ++j) seconds.push_back(run(kMessages).seconds);
      const double off = median(seconds) / target;
      constexpr double kClose = 0.02;
      if (std::abs(off - 1) < kClose || i + 1 == kRounds) break;
      rate *= off;
    }
    return rate;
  }

  double steps_with_messages() const { return (ranks_.size() - 1.0) / ranks_.size(); }

  void describe(OverlapRow& row, const std::vector<Repeat>& repeats) {
    row.strategy = choice_.strategy->name;
    row.partition = choice_.problem->partition();
    row.mesh = choice_.problem->mesh().text();
    row.pass = name_of(pass_);
    row.ranks = ranks_.size();
    row.threads = options_.threads;
    row.repeats = static_cast<int>(repeats.size());
    row.shape = task_.shape;
    row.mask = task_.mask_words;
    row.piece = ranks_.options().piece;
    row.piece_abroad = ranks_.options().piece_abroad;
    run(kMessages);
    const auto [bytes, messages] = sent();
    row.bytes = bytes;
    row.messages = messages;
    const auto of = [&](double Repeat::*figure) {
      std::vector<double> values;
      for (const Repeat& r : repeats) values.push_back(r.*figure);
      return median(values);
    };
    row.compute = of(&Repeat::compute);
    row.comm = of(&Repeat::comm);
    row.ratio = row.comm / (row.compute * steps_with_messages());
    if (ranks_.rank() == 0 && bytes > 0) row.plannable = plannable(row);
  }

  /// `hidden` of the forecast on a machine whose kernels and link take as long as they were seen to
  /// take, and where all messages move at all times.
  double plannable(const OverlapRow& row) const {
    const Plan plan = make_plan(*choice_.strategy, *choice_.problem, pass_);
    const auto seconds = [&](double rate, double bandwidth) {
      const Machine machine{.latency = 0, .bandwidth = bandwidth, .rate = rate, .overhead = 0};
      return rehearse(*choice_.problem, plan, machine).forecast_seconds();
    };
    constexpr double kNoTime = 1e30;
    const double rate = seconds(1, kNoTime) / row.compute;
    const double bandwidth = seconds(kNoTime, 1) / row.comm;
    return 1 - (seconds(rate, bandwidth) - row.compute) / row.comm;
  }

  void summarise(OverlapRow& row, const std::vector<Repeat>& repeats, Run Repeat::*which) const {
    std::vector<double> both, wait, hidden;
    for (const Repeat& r : repeats) {
      both.push_back((r.*which).seconds);
      wait.push_back((r.*which).wait);
      hidden.push_back(r.hidden(r.*which));
    }
    row.both = median(both);
    row.wait = median(wait);
    row.hidden = median(hidden);
    row.hidden_min = *std::min_element(hidden.begin(), hidden.end());
    row.hidden_max = *std::max_element(hidden.begin(), hidden.end());
  }

  Communicator& ranks_;
  const Task& task_;
  const Choice& choice_;
  Pass pass_;
  const OverlapOptions& options_;
  Contender<E>& contender_;
  RunTimes last_;
};

template <class E>
std::vector<OverlapRow> measure_passes(Communicator& ranks, const Task& task, const Choice& choice,
                                       const OverlapOptions& options) {
  Contender<E> contender(task, choice, ranks, options.threads);
  std::vector<OverlapRow> rows;
  for (const Pass pass : task.passes()) {
    auto more = Overlap<E>(ranks, task, choice, pass, options, contender).measure();
    rows.insert(rows.end(), more.begin(), more.end());
  }
  return rows;
}

}  // namespace

std::vector<OverlapRow> measure_overlap(Communicator& ranks, const Task& task,
                                        const std::string& strategy,
                                        const OverlapOptions& options) {
  Task mine = task;
  mine.wish.strategy = strategy;
  mine.wish.ranks = ranks.size();
  const auto measure_forward_if_must = [&]() -> std::vector<OverlapRow> {
    const Machine machine =
        machine_of(task.machine, calibrate(ranks, task.shape, task.type, options.threads,
                                           task.wish.gradients, {}, {}, task.scoring.score));
    Choice choice;
    try {
      choice = choose(mine.wish, mine.shape, mine.mask, mine.type, machine);
    } catch (const std::invalid_argument& e) {
      OverlapRow row;
      row.strategy = strategy;
      row.pass = name_of(mine.passes().back());
      row.ranks = ranks.size();
      row.shape = mine.shape;
      row.mask = mine.mask_words;
      row.refused = e.what();
      return {row};
    }
    const auto measure = task.type == Type::bf16 ? measure_passes<BFloat16>
                         : task.type == Type::f4 ? measure_passes<float>
                                                 : measure_passes<double>;
    return measure(ranks, mine, choice, options);
  };
  std::vector<OverlapRow> rows = measure_forward_if_must();
  const Strategy* known = find_strategy(strategy);
  if (mine.wish.gradients && known->backward == nullptr) {
    // The pass that it has is measured; the other has a row that says why not.
    mine.wish.gradients = false;
    const std::vector<OverlapRow> forward = measure_forward_if_must();
    rows.insert(rows.begin(), forward.begin(), forward.end());
  }
  return rows;
}

nlohmann::ordered_json fields(const OverlapRow& row) {
  using nlohmann::ordered_json;
  const Shape& s = row.shape;
  ordered_json j{{"strategy", row.strategy},
                 {"partition", row.partition},
                 {"mesh", row.mesh},
                 {"ranks", row.ranks},
                 {"threads", row.threads},
                 {"tokens", s.keys},
                 {"queries", s.queries},
                 {"heads", s.query_heads},
                 {"kv_heads", s.key_heads},
                 {"d", s.d_qk},
                 {"dv", s.d_v},
                 {"mask", row.mask},
                 {"pass", row.pass},
                 {"polling", row.polling}};
  const bool ran = row.refused.empty();
  const auto add = [&](const char* name, const ordered_json& value) {
    j[name] = ran ? value : ordered_json();
  };
  const auto figure = [](double value) {
    return std::isfinite(value) ? ordered_json(value) : ordered_json();
  };
  add("piece_bytes", row.piece);
  add("piece_abroad_bytes", row.piece_abroad);
  add("bytes_per_rank", static_cast<Index>(row.bytes));
  add("messages", static_cast<Index>(row.messages));
  add("link_bytes_per_second", row.rate > 0 ? ordered_json(row.rate) : ordered_json());
  add("comm_over_compute", figure(row.ratio));
  add("compute_seconds", row.compute);
  add("comm_seconds", row.comm);
  add("both_seconds", row.both);
  add("wait_seconds", row.wait);
  add("hidden", figure(row.hidden));
  add("hidden_min", figure(row.hidden_min));
  add("hidden_max", figure(row.hidden_max));
  add("hidden_plannable", figure(row.plannable));
  add("steady", row.steady);
  add("repeats", row.repeats);
  j["refused"] = ran ? ordered_json() : ordered_json(row.refused);
  return j;
}

std::string to_table(const std::vector<OverlapRow>& rows) {
  std::string out = fmt::format(
      "{:<10} {:<10} {:<8} {:>7} {:<4} {:>10} {:>9} {:>6} {:>9} {:>9} {:>9} {:>9} "
      "{:>6} {:>13} {:>6}\n",
      "strategy", "partition", "pass", "tokens", "poll", "sent/rank", "link MB/s", "ratio",
      "compute", "comm", "both", "wait", "hidden", "(min-max)", "plan");
  for (const OverlapRow& r : rows) {
    if (!r.refused.empty()) {
      out += fmt::format("{:<10} {:<10} {:<8} {:>7} refused: {}\n", r.strategy, "", r.pass,
                         r.shape.keys, r.refused);
      continue;
    }
    out += fmt::format(
        "{:<10} {:<10} {:<8} {:>7} {:<4} {:>10} {:>9} {:>6.2f} {:>9.5f} {:>9.5f} {:>9.5f} "
        "{:>9.5f} {:>6.3f} {:>13} {:>6.3f}{}\n",
        r.strategy, r.partition, r.pass, r.shape.keys, r.polling ? "yes" : "no",
        in_bytes(static_cast<Index>(r.bytes)), shown(r.rate / 1e6, 1), r.ratio, r.compute, r.comm,
        r.both, r.wait, r.hidden, fmt::format("({:.2f}-{:.2f})", r.hidden_min, r.hidden_max),
        r.plannable, r.steady ? "" : " UNSTEADY");
  }
  return out;
}

}  // namespace dattn
