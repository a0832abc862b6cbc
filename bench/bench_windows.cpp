// Question: within a host, what is it worth to look at the memory of other ranks, or to copy from
// it once, instead of sending through MPI?
//
//   mpirun -np 4 --bind-to core build/release/bench/bench_windows
//                --queries 64 --tokens 64K --heads 8 --head-dim 128 --mask full --pass both
//
// Every repeat runs each strategy over windows and over MPI, whole and without kernels, one after
// the other; the ratio is that of one repeat, and the median over repeats is shown. Open MPI copies
// once (CMA) where the kernel and the container let it, and twice with
// `--mca btl_vader_single_copy_mechanism none`.
#include <fmt/format.h>

#include <array>

#include "bench/contender.hpp"
#include "bench/main.hpp"
#include "bench/measure.hpp"
#include "kernels/isa.hpp"
#include "launcher/output_file.hpp"
#include "launcher/report.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"
#include "launcher/version.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;
using comm::Windows;

constexpr const char* kName = "bench_windows";

po::options_description described_options() {
  std::vector<std::string> names{"all"};
  for (const Strategy& strategy : strategies()) names.emplace_back(strategy.name);
  po::options_description options("bench_windows: windows against MPI within a host");
  options.add(problem_options()).add(split_options(false));
  po::options_description work("Bench");
  work.add_options()  //
      ("strategies", words(names)->default_value({"ring"}, "ring"),
       "which ones, as a comma list (see dattn list)")  //
      ("pass", word({"forward", "both"})->default_value("forward"),
       "both: also backward, from a generated dO")                                     //
      ("repeat", po::value<Positive>()->default_value({9}), "timed repeats")           //
      ("threads", po::value<Positive>()->default_value({1}), "OpenMP threads a rank")  //
      ("help", "this text");
  return options.add(work);
}

/// Seconds of the slowest rank for a run of a pass, or of its messages alone.
template <class C>
double run(Communicator& world, C& contender, Pass pass, const RunParts& parts, RunTimes& times) {
  world.barrier();
  times = contender.run(pass, parts);
  std::array<double, 1> most{times.seconds};
  world.all_reduce_max(most);
  return most[0];
}

template <class E>
void measure(Communicator& world, Windows& windows, const Task& task, const Choice& choice,
             int threads, int repeats) {
  Contender<E, Windows> seen(task, choice, windows, threads);
  Contender<E> sent(task, choice, world, threads);
  for (const Pass pass : task.passes()) {
    for (const bool kernels : {false, true}) {
      RunParts parts;
      parts.kernels = kernels;
      std::vector<double> ratios, over_windows, over_mpi;
      RunTimes times, other;
      for (int i = -1; i < repeats; ++i) {  // the first one warms up
        const double a = run(world, seen, pass, parts, times);
        const double b = run(world, sent, pass, parts, other);
        if (i < 0) continue;
        over_windows.push_back(a);
        over_mpi.push_back(b);
        ratios.push_back(b / a);
      }
      std::array<std::int64_t, 3> bytes{times.bytes_sent, times.moved.viewed, times.moved.copied};
      world.all_reduce_sum(bytes);
      if (world.rank() != 0) continue;
      const auto [least, most] = std::minmax_element(ratios.begin(), ratios.end());
      write_text_file(
          "-", fmt::format("{:<16} {:<9} {:<9} {:>12.6f} {:>12.6f} {:>8.2f} {:>8.2f} {:>8.2f} "
                           "{:>12} {:>12} {:>12}\n",
                           choice.strategy->name, name_of(pass), kernels ? "whole" : "messages",
                           median(over_windows), median(over_mpi), median(ratios), *least, *most,
                           in_bytes(bytes[0]), in_bytes(bytes[1]), in_bytes(bytes[2])));
    }
  }
}

void bench(Communicator& world, const std::vector<std::string>& arguments,
           const po::options_description& described) {
  Task task;
  std::vector<std::string> names;
  int repeats = 0;
  int threads = 0;
  together(world, [&] {
    const po::variables_map values = parse(kName, described, arguments);
    if (world.size() < 2) {
      throw Failure(Exit::usage, "one rank has no messages; start two or more with mpirun -np");
    }
    task = make_task(values);
    if (values["pass"].as<std::string>() == "both") {
      task.wish.gradients = true;
      task.source.add_d_o(values["seed"].as<Count>().value);
    }
    repeats = at_most("repeat", values["repeat"].as<Positive>().value, 1000000);
    threads = at_most("threads", values["threads"].as<Positive>().value, 1024);
    names = values["strategies"].as<std::vector<std::string>>();
  });
  Windows windows(world, {});
  windows.copy_with(threads);
  if (world.rank() == 0) {
    write_text_file(
        "-",
        fmt::format("# dattn {}: {}, kernels for {}, {} ranks x {} threads, median of {}{}\n"
                    "{:<16} {:<9} {:<9} {:>12} {:>12} {:>8} {:>8} {:>8} {:>12} {:>12} {:>12}\n",
                    kVersion, kName, chosen_isa().name, world.size(), threads, repeats,
                    windows.trouble().empty() ? "" : "; NO WINDOWS: " + windows.trouble(),
                    "strategy", "pass", "part", "windows, s", "MPI, s", "MPI/win.", "least", "most",
                    "sent", "viewed", "copied"));
  }
  for (const Strategy& strategy : strategies()) {
    if (std::find(names.begin(), names.end(), "all") == names.end() &&
        std::find(names.begin(), names.end(), strategy.name) == names.end()) {
      continue;
    }
    Task one = task;
    one.wish.strategy = std::string(strategy.name);
    std::optional<Choice> choice;
    try {
      choice = choose_for(one, world.size(), {});
    } catch (const Failure& refused) {  // on all ranks, which see the same
      if (world.rank() == 0) write_text_file("-", fmt::format("{}\n", refused.what()));
      continue;
    }
    switch (one.type) {
      case Type::bf16:
        measure<BFloat16>(world, windows, one, *choice, threads, repeats);
        break;
      case Type::f4:
        measure<float>(world, windows, one, *choice, threads, repeats);
        break;
      case Type::f8:
        measure<double>(world, windows, one, *choice, threads, repeats);
        break;
    }
  }
}

}  // namespace
}  // namespace dattn

int main(int argc, char** argv) {
  const auto described = dattn::described_options();
  return dattn::bench_main(
      dattn::kName, argc, argv, described,
      [&](dattn::comm::Communicator& world, const std::vector<std::string>& arguments) {
        dattn::bench(world, arguments, described);
      });
}
