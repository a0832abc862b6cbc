// Question: how close do P ranks come to 1/P of one rank's time, on the same problem in the same
// job?
//
// Each repeat times one rank alone (strategy local, the others wait and yield) and then all ranks;
// the figure is the median over repeats of t(P) / (t(1) / P). Times are maxima over ranks.
//
//   mpirun -np 2 --bind-to none bench_scaling --tokens 8K --heads 8 --head-dim 128 --mask causal
//          --strategy ring --partition zigzag --repeat 7 [--json]
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

#include "comm/session.hpp"
#include "launcher/calibrate.hpp"
#include "launcher/options.hpp"
#include "launcher/values.hpp"
#include "parallel/engine.hpp"
#include "parallel/rehearse.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

/// A problem on some ranks, with its inputs in place.
class Bench {
 public:
  Bench(const Task& task, const Choice& choice, Communicator& ranks, int threads)
      : choice_(choice),
        program_(choice.strategy->program(*choice.problem, ranks.rank())),
        engine_(*choice_.problem, program_, ranks,
                {.score = {.scale = task.scale}, .threads = threads}) {
    for (const SlotId slot : program_.inputs) {
      const Block& block = program_.slots[static_cast<std::size_t>(slot)].block;
      const Partition& tokens =
          of_queries(block.kind) ? choice.problem->queries() : choice.problem->keys();
      task.source.read(block.kind, tokens.positions(block.rows),
                       reinterpret_cast<float*>(engine_.input(slot).data()));
    }
  }

  RunTimes run() { return engine_.run(); }

 private:
  Choice choice_;
  Program program_;
  Engine<Communicator> engine_;
};

int bench(int argc, char** argv) {
  po::options_description options("bench_scaling");
  options.add(problem_options()).add(split_options());
  options.add_options()                                                                //
      ("repeat", po::value<Positive>()->default_value({7}), "timed repeats")           //
      ("threads", po::value<Positive>()->default_value({1}), "OpenMP threads a rank")  //
      ("json", "one JSON object instead of text")("help", "this text");
  const std::vector<std::string> words(argv + 1, argv + argc);
  const auto values = parse("bench_scaling", options, words);
  comm::Session session;
  Communicator& world = session.world();
  world.set_deadline(3600);  // ranks wait while rank 0 works alone
  Communicator alone = world.split(world.rank(), 0);

  const Task task = make_task(values);
  const int threads = static_cast<int>(values["threads"].as<Positive>().value);
  const auto repeats = static_cast<int>(values["repeat"].as<Positive>().value);
  const Machine machine =
      machine_of(task.machine, calibrate(world, task.shape, task.type, threads));
  const Choice choice = choose_for(task, world.size(), machine);
  Task local = task;
  local.wish = {"local", "contiguous", std::nullopt, 1};
  const Rehearsal rehearsal =
      rehearse(*choice.problem, make_plan(*choice.strategy, *choice.problem), machine);
  Bench together(task, choice, world, threads);
  std::optional<Bench> single;
  if (world.rank() == 0) single.emplace(local, choose_for(local, 1, machine), alone, threads);

  std::vector<double> ones;
  std::vector<double> all;
  std::vector<double> ratios;
  std::vector<double> waits;
  for (int i = -1; i < repeats; ++i) {  // the first warms up
    world.barrier();
    double one = 0;
    if (single) one = single->run().seconds;
    world.barrier();
    const RunTimes mine = together.run();
    std::array<double, 3> slowest{mine.seconds, mine.wait, one};
    world.all_reduce_max(slowest);
    if (i < 0) continue;
    ones.push_back(slowest[2]);
    all.push_back(slowest[0]);
    waits.push_back(slowest[1] / slowest[0]);
    ratios.push_back(slowest[0] * world.size() / slowest[2]);
  }
  if (world.rank() != 0) return 0;
  const double forecast = rehearsal.forecast_seconds();
  const double flops = static_cast<double>(rehearsal.pairs_total()) * task.shape.flops_per_pair();
  if (values.count("json") != 0) {
    fmt::print("{}\n", nlohmann::json{{"bench", "scaling"},
                                      {"strategy", choice.strategy->name},
                                      {"partition", choice.problem->partition()},
                                      {"ranks", world.size()},
                                      {"threads", threads},
                                      {"tokens", task.shape.keys},
                                      {"heads", task.shape.query_heads},
                                      {"kv_heads", task.shape.key_heads},
                                      {"d", task.shape.d_qk},
                                      {"dv", task.shape.d_v},
                                      {"mask", task.mask_words},
                                      {"isa", chosen_isa().name},
                                      {"seconds_one_rank", median(ones)},
                                      {"seconds", median(all)},
                                      {"ratio_to_ideal", median(ratios)},
                                      {"ratios", ratios},
                                      {"exposed_wait_share", median(waits)},
                                      {"forecast_over_measured", forecast / median(all)},
                                      {"gflops", flops / median(all) / 1e9},
                                      {"repeats", repeats}}
                           .dump());
  } else {
    fmt::print(
        "{} {} {} ranks x {} threads, {} tokens, heads {}:{}, d {}:{}, mask {}, {}\n"
        "one rank {:.4f} s, all ranks {:.4f} s, ratio to ideal {:.3f} (min {:.3f}, max {:.3f}, "
        "median "
        "of {}), exposed wait {:.1f} %, forecast / measured {:.2f}, {:.1f} GFLOP/s\n",
        choice.strategy->name, choice.problem->partition(), world.size(), threads, task.shape.keys,
        task.shape.query_heads, task.shape.key_heads, task.shape.d_qk, task.shape.d_v,
        task.mask_words, chosen_isa().name, median(ones), median(all), median(ratios),
        *std::min_element(ratios.begin(), ratios.end()),
        *std::max_element(ratios.begin(), ratios.end()), repeats, 100 * median(waits),
        forecast / median(all), flops / median(all) / 1e9);
  }
  return 0;
}

}  // namespace
}  // namespace dattn

int main(int argc, char** argv) {
  try {
    return dattn::bench(argc, argv);
  } catch (const std::exception& e) {
    fmt::print(stderr, "bench_scaling: {}\n", e.what());
    return 2;
  }
}
