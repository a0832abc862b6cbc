#include "launcher/calibrate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <vector>

#include "launcher/kernel_rates.hpp"
#include "launcher/links.hpp"

namespace dattn {
namespace {

/// The row rates of the rank that is slowest at it; 0 where rows cost nothing on any.
RowRates slowest(comm::Communicator& world, const RowRates& own) {
  const auto seconds = [](double rate) { return rate > 0 ? 1 / rate : 0; };
  std::array<double, 2> all{seconds(own.rows), seconds(own.packs)};
  world.all_reduce_max(all);
  return {seconds(all[0]), seconds(all[1])};
}

double slowest(comm::Communicator& world, double rate) {
  std::array<double, 1> all{rate};
  world.all_reduce_min(all);
  return all[0];
}

}  // namespace

Machine calibrate(comm::Communicator& world, const Shape& shape, Type type, int threads,
                  bool backward, const Hosts& hosts, const Speeds& speeds, const Score& score) {
  Machine machine;
  machine.name = "measured at the start";
  const int ranks = world.size();
  const double own_speed = speeds.of(world.rank());
  // All ranks at once, as they will compute; a run takes as long as the slowest of them.
  const auto rate = [&](Pass pass) {
    world.barrier();
    return slowest(world,
                   kernel_rate(shape, ranks, type, pass, threads, wall_seconds, score) / own_speed);
  };
  machine.rate = rate(Pass::forward);
  if (type != Type::f8) {
    world.barrier();
    const RowRates own = row_rates(shape, ranks, type, threads, machine.rate * own_speed, nullptr,
                                   wall_seconds, score);
    const RowRates rows = slowest(world, {own.rows / own_speed, own.packs / own_speed});
    machine.rows = rows.rows;
    machine.packs = rows.packs;
  }
  set_grain(machine, grain_of(type));
  if (backward) machine.backward_rate = rate(Pass::backward);
  const Links links = measure_links(world, hosts);
  if (const auto& link = links.inside ? links.inside : links.between) {
    machine.latency = link->latency;
    machine.bandwidth = link->bandwidth;
  }
  if (links.between) {
    machine.net_latency = links.between->latency;
    machine.net_bandwidth = links.between->bandwidth;
  }
  return machine;
}

namespace {

/// Medians of a few rounds of rates that all ranks measure at once, in steps of 1/32 of the
/// fastest.
template <class Rate>
Speeds speeds_by(comm::Communicator& world, const Rate& rate) {
  constexpr int kRounds = 5;
  constexpr int kSteps = 32;
  std::vector<double> rates;
  for (int round = 0; round < kRounds; ++round) {
    world.barrier();
    rates.push_back(rate());
  }
  std::nth_element(rates.begin(), rates.begin() + kRounds / 2, rates.end());
  // Rank 0 decides, so that no rank's rounding counts.
  std::string words;
  const std::vector<std::string> all = world.gather(fmt::format("{:a}", rates[kRounds / 2]));
  if (world.rank() == 0) {
    std::vector<double> by_rank;
    for (const std::string& text : all) by_rank.push_back(std::strtod(text.c_str(), nullptr));
    const Speeds speeds = rounded_speeds(by_rank, kSteps);
    if (!speeds.equal()) words = speeds.text();
  }
  world.broadcast(words, 0);
  return words.empty() ? Speeds() : parse_speeds(words, world.size());
}

}  // namespace

Speeds measure_speeds(comm::Communicator& world, const Shape& shape, Type type, int threads) {
  return speeds_by(world,
                   [&] { return kernel_rate(shape, world.size(), type, Pass::forward, threads); });
}

Speeds measure_decode_speeds(comm::Communicator& world, const Shape& shape, Type type,
                             int threads) {
  return speeds_by(world, [&] { return decode_rate(shape, world.size(), type, threads); });
}

KernelRates measure_kernels(comm::Communicator& world, const Shape& shape, Type type, int threads,
                            const Isa* isa, bool with_rows) {
  KernelRates rates;
  const int ranks = world.size();
  world.barrier();
  rates.forward = slowest(world, quick_rate(shape, ranks, type, Pass::forward, threads, isa));
  rates.backward = slowest(world, quick_rate(shape, ranks, type, Pass::backward, threads, isa));
  rates.grain = grain_of(type, isa);
  if (!with_rows || type == Type::f8) return rates;
  const RowRates rows = slowest(world, row_rates(shape, ranks, type, threads, rates.forward, isa));
  rates.rows = rows.rows;
  rates.packs = rows.packs;
  return rates;
}

}  // namespace dattn
