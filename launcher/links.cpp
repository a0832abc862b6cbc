#include "launcher/links.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <map>
#include <vector>

#include "kernels/attend.hpp"
#include "kernels/partial.hpp"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double slowest(comm::Communicator& world, double seconds) {
  std::array<double, 1> all{seconds};
  world.all_reduce_max(all);
  return all[0];
}

/// With whom this rank exchanges; nobody: it only keeps pace.
struct Neighbours {
  int left = -1;
  int right = -1;
};

/// The ring of the ranks of this host.
Neighbours inside_host(const comm::Communicator& world, const Hosts& hosts) {
  const int here = world.rank();
  if (hosts.count() == 1) {
    if (world.size() == 1) return {};
    return {(here + world.size() - 1) % world.size(), (here + 1) % world.size()};
  }
  const std::vector<int>& ring = hosts.ranks(hosts.of(here));
  if (ring.size() == 1) return {};
  const auto at =
      static_cast<std::size_t>(std::find(ring.begin(), ring.end(), here) - ring.begin());
  return {ring[(at + ring.size() - 1) % ring.size()], ring[(at + 1) % ring.size()]};
}

/// How many ranks every host has at least.
int least_of(const Hosts& hosts) {
  std::size_t least = hosts.ranks(0).size();
  for (int h = 1; h < hosts.count(); ++h) least = std::min(least, hosts.ranks(h).size());
  return static_cast<int>(least);
}

/// The ring of the ranks of the same number on all hosts, of the first `most` ranks of each.
Neighbours between_hosts(const comm::Communicator& world, const Hosts& hosts, int most) {
  const int host = hosts.of(world.rank());
  const std::vector<int>& here = hosts.ranks(host);
  const auto at = std::find(here.begin(), here.end(), world.rank()) - here.begin();
  if (at >= most) return {};
  const auto on = [&](int other) {
    return hosts.ranks(other % hosts.count())[static_cast<std::size_t>(at)];
  };
  return {on(host + hosts.count() - 1), on(host + 1)};
}

bool anybody(comm::Communicator& world, const Neighbours& neighbours) {
  return slowest(world, neighbours.left < 0 ? 0 : 1) > 0;
}

/// Exchanges `bytes` with both neighbours while `work` goes on.
void exchange(comm::Communicator& world, const Neighbours& to, std::vector<std::byte>& out,
              std::vector<std::byte>& in, const std::function<void()>& work) {
  if (to.left < 0) return work();
  auto receive = world.recv(comm::strips_of(std::span<std::byte>(in)), to.left);
  auto send = world.send(comm::strips_of(std::span<const std::byte>(out)), to.right);
  work();
  receive.wait();
  send.wait();
}

/// Seconds of one of `times` exchanges, of the slowest rank.
double exchange_seconds(
    comm::Communicator& world, const Neighbours& to, std::size_t bytes, int times,
    const std::function<void()>& work = [] {}) {
  std::vector<std::byte> out(bytes);
  std::vector<std::byte> in(bytes);
  world.barrier();
  const auto start = Clock::now();
  for (int i = 0; i < times; ++i) exchange(world, to, out, in, work);
  return slowest(world, since(start) / times);
}

constexpr std::size_t kLarge = std::size_t{1} << 20;

/// A link that `together` ranks share, from exchanges of all of them, and of one by itself.
Link measure(comm::Communicator& world, const Neighbours& all, const Neighbours& one,
             int together) {
  exchange_seconds(world, all, kLarge, 1);  // connections are made, buffers touched
  const double small = exchange_seconds(world, one, 8, 16);
  const double large = exchange_seconds(world, all, kLarge, 4);
  return {small, together * static_cast<double>(kLarge) / std::max(large - small, 0.1 * large)};
}

/// Kernel work for a while, polling.
class Stint {
 public:
  Stint(comm::Communicator& world, int threads) : threads_(threads) {
    work_.threads = threads;
    work_.workspace = &workspace_;
    work_.poll = [&world] { world.poll(); };
  }

  void operator()(double seconds) {
    const auto calls = std::max<Index>(1, static_cast<Index>(seconds / one_));
    for (Index i = 0; i < calls; ++i) once();
  }
  void settle() {
    once();
    const auto start = Clock::now();
    for (int i = 0; i < 4; ++i) once();
    one_ = since(start) / 4;
  }

 private:
  static constexpr Index kRows = 128;
  static constexpr Index kDim = 64;

  void once() {
    const Shape shape{kRows, kRows, threads_, threads_, threads_, kDim, kDim};
    const auto heads = static_cast<Index>(threads_);
    numbers_.resize(static_cast<std::size_t>(kRows * heads * kDim), 0.01F);
    records_.resize(static_cast<std::size_t>(kRows * heads * record_length(kDim)));
    const View<const float> view{numbers_.data(), kRows, heads, kDim};
    const View<float> out{records_.data(), kRows, heads, record_length(kDim)};
    clear(out);
    const Where where{shape, {0, heads}, {0, heads}, {0, heads}, {{0, kRows, 1}}, {{0, kRows, 1}}};
    attend(view, view, view, out, where, *mask_, work_);
  }

  int threads_;
  Workspace workspace_;
  Work work_;
  double one_ = 1e-3;
  std::vector<float> numbers_, records_;
  MaskPtr mask_ = parse_mask("full", Shape{kRows, kRows, 1, 1, 1, kDim, kDim});
};

double overlap_of(comm::Communicator& world, const Neighbours& to, double bandwidth, int threads) {
  // About ten milliseconds.
  const auto bytes = static_cast<std::size_t>(
      std::clamp(0.01 * bandwidth, 65536.0, static_cast<double>(16 * kLarge)));
  Stint kernel(world, threads);
  kernel.settle();
  // The least of a few, as others may use the cores too.
  const auto least = [&](const Neighbours& with, std::size_t size,
                         const std::function<void()>& work) {
    double seconds = exchange_seconds(world, with, size, 1, work);
    for (int i = 0; i < 4; ++i) {
      seconds = std::min(seconds, exchange_seconds(world, with, size, 1, work));
    }
    return seconds;
  };
  const double alone = least(to, bytes, [] {});
  const auto work = [&] { kernel(2 * alone); };
  const double computing = least({}, 0, work);
  const double both = least(to, bytes, work);
  return std::clamp(1 - (both - computing) / alone, 0.0, 1.0);
}

}  // namespace

Hosts hosts_of(comm::Communicator& world) {
  std::map<std::string, int> numbers;
  std::vector<int> by_rank;
  for (const std::string& name : world.all_gather(comm::processor_name())) {
    by_rank.push_back(numbers.try_emplace(name, static_cast<int>(numbers.size())).first->second);
  }
  return Hosts(by_rank);
}

Links measure_links(comm::Communicator& world, const Hosts& hosts) {
  Links links;
  const Neighbours ring = inside_host(world, hosts);
  if (anybody(world, ring)) links.inside = measure(world, ring, ring, 1);
  if (hosts.count() > 1) {
    const int together = least_of(hosts);
    links.between = measure(world, between_hosts(world, hosts, together),
                            between_hosts(world, hosts, 1), together);
  }
  return links;
}

Overlap overlap_of_links(comm::Communicator& world, const Hosts& hosts, const Links& links,
                         int threads) {
  Overlap overlap;
  if (links.inside) {
    overlap.inside = overlap_of(world, inside_host(world, hosts), links.inside->bandwidth, threads);
  }
  if (links.between) {
    const int together = least_of(hosts);
    overlap.between = overlap_of(world, between_hosts(world, hosts, together),
                                 links.between->bandwidth / together, threads);
  }
  return overlap;
}

}  // namespace dattn
