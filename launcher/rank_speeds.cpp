#include "launcher/rank_speeds.hpp"

#include <fmt/format.h>

#include <stdexcept>

#include "launcher/calibrate.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"

namespace dattn {
namespace po = boost::program_options;

po::options_description speeds_option() {
  po::options_description options("Speeds");
  options.add_options()  //
      ("rank-speeds", po::value<std::string>()->default_value(""),
       "how fast each rank computes beside the others, e.g. 1,1,0.5 or 8x1,8x0.5: --partition "
       "balanced deals rows by it, heads are placed by it, and lightseq lends by it; or measured "
       "(not by plan): by their kernels, rounded and printed [all are equal]");
  return options;
}

bool speeds_are_measured(const Task& task) { return task.rank_speeds == kMeasuredSpeeds; }

Speeds speeds_from(const std::string& words, int ranks) {
  if (words.empty()) return {};
  if (words == kMeasuredSpeeds) {
    throw Failure(Exit::usage,
                  "--rank-speeds measured: nothing is measured here; give the list that dattn run "
                  "--rank-speeds measured prints");
  }
  try {
    return parse_speeds(words, ranks);
  } catch (const std::invalid_argument& e) {
    throw Failure(Exit::usage, "--rank-speeds: " + escaped(e.what()));
  }
}

Speeds speeds_of(comm::Communicator& world, const Task& task, int threads) {
  if (speeds_are_measured(task)) return measure_speeds(world, task.shape, task.type, threads);
  Speeds speeds;
  together(world, [&] { speeds = speeds_from(task.rank_speeds, world.size()); });
  return speeds;
}

std::string speeds_line(bool measured, const Speeds& speeds) {
  const std::string how = measured ? ", measured" : "";
  if (speeds.equal()) return fmt::format("speeds of ranks: equal{}\n", how);
  return fmt::format("speeds of ranks: {}{}{}\n", speeds.text(), how,
                     measured ? "; the same plan again: --rank-speeds " + speeds.text() : "");
}

std::string speeds_line(const Task& task, const Speeds& speeds) {
  return task.rank_speeds.empty() ? "" : speeds_line(speeds_are_measured(task), speeds);
}

}  // namespace dattn
