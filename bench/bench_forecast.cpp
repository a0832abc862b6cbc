// Question: how close does the forecast of kernels come to the time that they take of a processor,
// and does auto choose what is fastest?
//
// One process runs the kernels of all ranks of a plan one after the other, on numbers of its own,
// and sends nothing; time is that of the processor, and in units of a dense kernel that runs before
// and after, so that it may be shared with others. Beside the forecast stands what allowed pairs
// alone would say. `auto` is held to the candidate whose slowest rank takes least: kernels as
// measured and the bytes that it sends at a link's rate.
//
//   bench_forecast --mask causal window:511,0 --ranks 4 --tokens 4K --heads 4 --kv-heads 1
#include <fmt/format.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <iostream>
#include <limits>
#include <map>
#include <random>

#include "bench/measure.hpp"
#include "kernels/attend_backward.hpp"
#include "kernels/partial.hpp"
#include "launcher/kernel_rates.hpp"
#include "parallel/pairs.hpp"
#include "parallel/planner.hpp"
#include "parallel/rehearse.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;

constexpr const char* kName = "bench_forecast";

struct Setting {
  Shape shape;
  Type type = Type::f4;
  int ranks = 4;
  int repeats = 2;
  Machine machine;
  double anchor = 0;  ///< rate of the dense kernel when the machine was measured

  /// The same now: who shares the core changes it from minute to minute.
  double rate_now() const {
    return kernel_rate(shape, ranks, type, Pass::forward, 1, processor_seconds);
  }
};

/// What any kernel call of a bench may read and write.
template <class E>
class Numbers {
 public:
  /// Seconds of one kernel call at this place; the least of some runs.
  double seconds(const Where& where, const Mask& mask, Pass pass, int repeats) {
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < repeats; ++i) least = std::min(least, once(where, mask, pass));
    return least;
  }

 private:
  using Sum = SumOf<E>;

  template <class N>
  static View<N> view(std::vector<N>& numbers, Index rows, Index heads, Index dim) {
    const auto due = static_cast<std::size_t>(rows * heads * dim);
    std::minstd_rand bits(static_cast<unsigned>(numbers.size()) + 1);
    while (numbers.size() < due) numbers.push_back(N(static_cast<float>(bits() % 2001) / 1e3F - 1));
    return {numbers.data(), rows, heads, dim};
  }
  /// To read.
  template <class N>
  static View<const N> given(std::vector<N>& numbers, Index rows, Index heads, Index dim) {
    const View<N> all = view(numbers, rows, heads, dim);
    return {all.data, rows, heads, dim};
  }

  double once(const Where& where, const Mask& mask, Pass pass) {
    const Shape& s = where.shape;
    const Index rows = size(where.queries);
    const Index keys = size(where.keys);
    const Index heads = where.query_heads.size();
    const Work work{.workspace = &workspace_};
    const auto q = given(q_, rows, heads, s.d_qk);
    const auto k = given(k_, keys, where.key_heads.size(), s.d_qk);
    const auto v = given(v_, keys, where.value_heads.size(), s.d_v);
    if (pass == Pass::forward) {
      const auto out = view(out_, rows, heads, record_length(s.d_v));
      clear(out);
      const double start = processor_seconds();
      attend(q, k, v, out, where, mask, work);
      return processor_seconds() - start;
    }
    const auto d_o = given(d_o_, rows, heads, s.d_v);
    stats_.resize(std::max(stats_.size(), static_cast<std::size_t>(rows * heads)), Sum{6});
    const View<const Sum> stats{stats_.data(), rows, heads, 1};
    const auto dq = view(dq_, rows, heads, s.d_qk);
    const auto dk = view(dk_, keys, where.key_heads.size(), s.d_qk);
    const auto dv = view(dv_, keys, where.value_heads.size(), s.d_v);
    const double start = processor_seconds();
    attend_backward(q, k, v, d_o, stats, stats, dq, dk, dv, where, mask, work);
    return processor_seconds() - start;
  }

  std::vector<E> q_, k_, v_, d_o_;
  std::vector<Sum> out_, stats_, dq_, dk_, dv_;
  Workspace workspace_;
};

/// Processor time that the kernels of a Program take.
template <class E>
double kernel_seconds(const Problem& problem, const Program& program, int repeats) {
  static Numbers<E> numbers;
  double seconds = 0;
  const auto add = [&](const auto& step) {
    const auto rows = [&](SlotId s) -> const Ranges& {
      return program.slots[static_cast<std::size_t>(s)].block.rows;
    };
    const Shape& shape = problem.shape();
    for (const Range heads : heads_served(program, step, shape)) {
      const Where where{shape,
                        heads,
                        shape.key_heads_of(heads),
                        shape.value_heads_of(heads),
                        problem.queries().positions(rows(step.q)),
                        problem.keys().positions(rows(step.k))};
      seconds += numbers.seconds(where, problem.mask(), program.pass, repeats);
    }
  };
  for (const Step& step : program.steps) {
    if (const auto* forward = std::get_if<Attend>(&step)) add(*forward);
    if (const auto* backward = std::get_if<AttendBackward>(&step)) add(*backward);
  }
  return seconds;
}

double sum(const std::vector<double>& all) {
  double total = 0;
  for (const double one : all) total += one;
  return total;
}

/// A candidate of the planner, in seconds.
struct Row {
  std::string name;
  double measured = 0;  ///< kernels of all ranks, at the speed of when the machine was measured
  double by_area = 0;   ///< forecasts of the same
  double forecast = 0;
  double slowest = 0;  ///< of the slowest rank, with the bytes that it sends
};

Row measure(const Setting& setting, const Choice& choice, Pass pass) {
  const Problem& problem = *choice.problem;
  const Plan plan = make_plan(*choice.strategy, problem, pass);
  const Rehearsal found = rehearse(problem, plan, setting.machine);
  if (found.fault) throw std::runtime_error(found.fault->text());
  Machine by_area = setting.machine;
  by_area.lanes = by_area.packs = 0;
  Row row;
  row.name = fmt::format("{} {}", choice.strategy->name, problem.partition());
  const auto in_kernels = [](const Rehearsal& all) {
    return sum(all.compute_seconds) - sum(all.sum_seconds);
  };
  row.forecast = in_kernels(found);
  row.by_area = in_kernels(rehearse(problem, plan, by_area));
  const double before = setting.rate_now();
  for (std::size_t r = 0; r < plan.size(); ++r) {
    const double own = setting.type == Type::bf16
                           ? kernel_seconds<BFloat16>(problem, plan[r], setting.repeats)
                           : kernel_seconds<float>(problem, plan[r], setting.repeats);
    row.measured += own;
    const double wire = static_cast<double>(found.bytes_sent[r]) / setting.machine.bandwidth;
    row.slowest = std::max(row.slowest, own + wire);
  }
  const double slower = setting.anchor / ((before + setting.rate_now()) / 2);
  row.measured /= slower;
  row.slowest /= slower;
  return row;
}

/// How many forecasts are within 15 percent, by what they say of pairs.
struct Tally {
  int rows = 0;
  int near_by_area = 0;
  int near = 0;
  int choices = 0;
  int best = 0;     ///< of these, those that are fastest, within 3 percent
  double loss = 0;  ///< of the worst one, over the fastest

  void add(const Row& row) {
    const auto near_by = [&](double forecast) {
      return std::abs(forecast / row.measured - 1) <= 0.15 ? 1 : 0;
    };
    ++rows;
    near_by_area += near_by(row.by_area);
    near += near_by(row.forecast);
  }
};

void measure(const Setting& setting, const std::string& words, const MaskPtr& mask, Pass pass,
             const std::vector<std::string>& only, Tally& tally) {
  Wish wish;
  wish.ranks = setting.ranks;
  const auto choose_as = [&](const std::string& strategy, const std::string& partition) {
    wish.strategy = strategy;
    wish.partition = partition;
    return choose(wish, setting.shape, mask, setting.type, setting.machine);
  };
  std::vector<Row> rows;
  for (const Strategy& strategy : strategies()) {
    const auto wanted = std::find(only.begin(), only.end(), strategy.name);
    if (!only.empty() && wanted == only.end()) continue;
    for (const PartitionKind& partition : partition_kinds()) {
      try {
        rows.push_back(measure(
            setting, choose_as(std::string(strategy.name), std::string(partition.name)), pass));
      } catch (const std::invalid_argument&) {
        continue;  // it refuses this problem
      }
      const Row& row = rows.back();
      tally.add(row);
      fmt::print("{:<28.28} {:<9} {:<26} {:>10.2f} {:>8.2f} {:>8.2f}\n", words, name_of(pass),
                 row.name, row.measured * 1e3, row.by_area / row.measured,
                 row.forecast / row.measured);
    }
  }
  if (pass == Pass::backward) return;  // auto weighs both passes, or the forward one
  const Choice chosen = choose_as("auto", "auto");
  const std::string name = fmt::format("{} {}", chosen.strategy->name, chosen.problem->partition());
  const auto least = std::min_element(
      rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.slowest < b.slowest; });
  const auto own =
      std::find_if(rows.begin(), rows.end(), [&](const Row& r) { return r.name == name; });
  if (own == rows.end()) return;
  const double loss = own->slowest / least->slowest;
  ++tally.choices;
  tally.best += loss <= 1.03 ? 1 : 0;
  tally.loss = std::max(tally.loss, loss);
  fmt::print("  auto: {}, {:.2f} of the fastest, {}\n", name, loss, least->name);
}

Machine measured_machine(const Setting& setting) {
  Machine machine{.name = "processor time"};
  const auto rate = [&](Pass pass) {
    return kernel_rate(setting.shape, setting.ranks, setting.type, pass, 1, processor_seconds);
  };
  machine.rate = rate(Pass::forward);
  machine.backward_rate = rate(Pass::backward);
  const RowRates rows = row_rates(setting.shape, setting.ranks, setting.type, 1, machine.rate,
                                  nullptr, processor_seconds);
  machine.rows = rows.rows;
  machine.packs = rows.packs;
  set_grain(machine, grain_of(setting.type));
  return machine;
}

void bench(const std::vector<std::string>& arguments, const po::options_description& described) {
  const po::variables_map values = parse(kName, described, arguments);
  Setting setting;
  const auto count = [&](const char* name) { return values[name].as<Positive>().value; };
  const auto limited = [&](const char* name, Index most) {
    if (const Index value = count(name); value <= most) return static_cast<int>(value);
    throw Failure(Exit::usage, fmt::format("--{}: at most {}", name, most));
  };
  const Index tokens = count("tokens");
  const Index dim = count("head-dim");
  const Index kv = count("kv-heads");
  setting.shape = {tokens, tokens, count("heads"), kv, kv, dim, dim};
  if (const auto why = complaint(setting.shape)) throw Failure(Exit::usage, *why);
  setting.type = values["dtype"].as<std::string>() == "bf16" ? Type::bf16 : Type::f4;
  setting.ranks = limited("ranks", 65536);
  setting.repeats = limited("repeat", 1000000);
  std::vector<MaskPtr> masks;
  std::string said;  // of the machine
  try {
    for (const std::string& mask : values["mask"].as<std::vector<std::string>>()) {
      masks.push_back(parse_mask(mask, setting.shape));
    }
    if (values.count("machine") != 0) said = values["machine"].as<std::string>();
    parse_machine(said, {});
  } catch (const std::invalid_argument& e) {
    throw Failure(Exit::usage, e.what());
  }
  setting.machine = measured_machine(setting);
  setting.anchor = setting.rate_now();
  setting.machine = parse_machine(said, setting.machine);
  fmt::print("{}\n{:<28} {:<9} {:<26} {:>10} {:>8} {:>8}\n", setting.machine.title(), "mask",
             "pass", "plan", "kernels ms", "by area", "forecast");
  std::vector<std::string> only = values["strategies"].as<std::vector<std::string>>();
  if (std::find(only.begin(), only.end(), "all") != only.end()) only.clear();
  Tally tally;
  for (std::size_t i = 0; i < masks.size(); ++i) {
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      measure(setting, values["mask"].as<std::vector<std::string>>()[i], masks[i], pass, only,
              tally);
    }
  }
  fmt::print("forecasts within 15 percent of kernels: {} of {}; by area {}\n", tally.near,
             tally.rows, tally.near_by_area);
  fmt::print("auto is within 3 percent of the fastest for {} of {} masks, at the worst {:.2f}\n",
             tally.best, tally.choices, tally.loss);
}

int main_of(int argc, char** argv) {
  std::vector<std::string> names{"all"};
  for (const Strategy& strategy : strategies()) names.emplace_back(strategy.name);
  po::options_description described(
      "bench_forecast: forecasts of kernels beside the time of a processor that they take");
  described.add_options()  //
      ("mask",
       po::value<std::vector<std::string>>()->multitoken()->default_value({"causal"}, "causal"),
       "masks, separated by spaces")  //
      ("strategies", words(names)->default_value({"all"}, "all"),
       "which ones, as a comma list, each under each partition (see dattn list)")  //
      ("ranks", po::value<Positive>()->default_value({4}), "ranks of the plans")   //
      ("tokens", po::value<Positive>()->default_value({4096}), "queries and keys")(
          "heads", po::value<Positive>()->default_value({4}), "query heads")          //
      ("kv-heads", po::value<Positive>()->default_value({1}), "key and value heads")  //
      ("head-dim", po::value<Positive>()->default_value({128}), "numbers a head")     //
      ("dtype", word({"f4", "bf16"})->default_value("f4"), "of Q, K, V and dO")       //
      ("repeat", po::value<Positive>()->default_value({2}),
       "runs of each kernel call; the least counts")                                  //
      ("machine", po::value<std::string>(), "what not to measure, as of dattn plan")  //
      ("help", "this text");
  try {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
      std::cout << described;
      return 0;
    }
    bench(arguments, described);
    return 0;
  } catch (const Failure& failure) {
    fmt::print(stderr, "{}: {}\n", kName, failure.what());
    return static_cast<int>(failure.code);
  } catch (const std::exception& e) {
    fmt::print(stderr, "{}: {}\n", kName, e.what());
    return static_cast<int>(Exit::usage);
  }
}

}  // namespace
}  // namespace dattn

int main(int argc, char** argv) { return dattn::main_of(argc, argv); }
