#include "bench/anchors.hpp"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <fstream>

#include "bench/measure.hpp"

namespace dattn {
namespace {

constexpr double kSteady = 0.10;        // two anchors may differ by this much
constexpr int kTriesPerRepeat = 3;      // at most
constexpr double kLeastSeconds = 0.02;  // shorter kernels run several times a repeat

/// Seconds of processor time since the machine started (of all, with what a host took away) and
/// since this process did.
struct Spent {
  double wall = now();
  double all = 0;
  double own = static_cast<double>(std::clock()) / CLOCKS_PER_SEC;

  Spent() {
    std::ifstream stat("/proc/stat");
    std::string name;
    stat >> name;
    double jiffies = 0;
    for (int field = 0; field < 8 && stat >> jiffies; ++field) {
      const bool idle = field == 3 || field == 4;
      if (!idle) all += jiffies / static_cast<double>(sysconf(_SC_CLK_TCK));
    }
  }
};

/// The share of the machine's time that others took between the two.
double foreign_share(const Spent& from, const Spent& to) {
  const double whole = (to.wall - from.wall) * static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN));
  return std::max(0.0, (to.all - from.all) - (to.own - from.own)) / whole;
}

}  // namespace

Measured measure(Subject& subject, const std::vector<Anchor>& anchors, const Effort& effort) {
  struct Sample {
    double seconds;
    std::vector<double> anchors;
    double poll_gap;
    bool steady;
  };
  const auto rates = [&] {
    std::vector<double> out;
    out.reserve(anchors.size());
    for (const Anchor& anchor : anchors) out.push_back(anchor.rate());
    return out;
  };
  subject.prepare();
  const double start = now();
  subject.run();  // warms up
  const int runs = std::max(1, static_cast<int>(std::ceil(kLeastSeconds / subject.run())));
  rates();
  std::vector<Sample> samples;
  const Spent spent_before;
  int steady = 0;
  bool in_time = true;
  std::vector<double> before = rates();
  while (steady < effort.repeats &&
         samples.size() < static_cast<std::size_t>(effort.repeats) * kTriesPerRepeat && in_time) {
    Sample sample{0, {}, 0, true};
    for (int i = 0; i < runs; ++i) {
      sample.seconds += subject.run() / runs;
      sample.poll_gap = std::max(sample.poll_gap, subject.poll_gap());
    }
    std::vector<double> after = rates();
    for (std::size_t i = 0; i < after.size(); ++i) {
      const double mean = (before[i] + after[i]) / 2;
      sample.steady = sample.steady && std::abs(before[i] - after[i]) <= kSteady * mean;
      sample.anchors.push_back(mean);
    }
    before = std::move(after);
    steady += sample.steady ? 1 : 0;
    samples.push_back(std::move(sample));
    in_time = effort.seconds <= 0 || now() - start < effort.seconds;
  }
  Measured out;
  out.foreign = foreign_share(spent_before, Spent());
  out.unsteady = steady < (in_time ? effort.repeats : std::min(effort.repeats, 3));
  for (const Sample& sample : samples) {
    if (!sample.steady && !out.unsteady) {
      ++out.dropped;
      continue;
    }
    out.seconds.push_back(sample.seconds);
    out.poll_gaps.push_back(sample.poll_gap);
    for (std::size_t i = 0; i < anchors.size(); ++i) {
      out.ratios[anchors[i].name].push_back(subject.work() / sample.seconds / 1e9 /
                                            sample.anchors[i]);
      out.anchors[anchors[i].name].push_back(sample.anchors[i]);
    }
  }
  return out;
}

}  // namespace dattn
