#include "launcher/watch.hpp"

#include <utility>

#include "launcher/options.hpp"
#include "launcher/values.hpp"

namespace dattn {

namespace po = boost::program_options;

po::options_description watch_options() {
  po::options_description options("When something is stuck");
  options.add_options()  //
      ("watchdog", po::value<Count>()->default_value({60}),
       "seconds without any rank moving after which the job is ended, with 86; 0: never. Never "
       "less "
       "than 20 times a run's forecast")  //
      ("flight-dir", po::value<std::string>(),
       "folder for the last steps of every rank, written when the job is stuck or fails; see dattn "
       "report [dattn-flight-JOB]");
  return options;
}

WatchOptions early_watch(const std::vector<std::string>& arguments) {
  WatchOptions watch;
  try {
    watch.seconds = static_cast<double>(parse_count(written(arguments, "--watchdog"), 0));
  } catch (const BadValue&) {  // not given, or refused later
  }
  const std::string folder = written(arguments, "--flight-dir");
  if (folder != "not given" && folder != "given") watch.flight_dir = folder;
  return watch;
}

WatchOptions read_watch(const po::variables_map& values) {
  constexpr Index kMost = 1000000;
  return {.seconds =
              static_cast<double>(at_most("watchdog", values["watchdog"].as<Count>().value, kMost)),
          .flight_dir = file_name(values, "flight-dir")};
}

std::function<void(std::size_t)> noted(comm::Communicator& world,
                                       std::function<void(std::size_t)> then) {
  return [progress = world.progress(), then = std::move(then)](std::size_t step) {
    if (progress != nullptr) progress->step(step);
    if (then) then(step);
  };
}

void note_program(comm::Communicator& world, const Program& program) {
  if (world.progress() == nullptr) return;
  std::vector<std::string> steps;
  steps.reserve(program.steps.size());
  for (const Step& step : program.steps) steps.push_back(text(program, step));
  world.progress()->program(std::move(steps));
}

}  // namespace dattn
