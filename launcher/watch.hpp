#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "comm/communicator.hpp"
#include "launcher/program_options_fwd.hpp"
#include "parallel/plan.hpp"

namespace dattn {

/// How a job that runs under mpirun notices that it is stuck.
struct WatchOptions {
  double seconds = 60;          ///< without any rank having moved; 0: never
  std::string flight_dir = {};  ///< where flight records go; empty: named after the job
};

/// Of the commands that run under mpirun: "watchdog" and "flight-dir".
boost::program_options::options_description watch_options();

/// What the user wants, from words that nobody has checked yet: the watch begins before MPI does,
/// and options are read by all ranks together. What makes no sense is left at its default here.
WatchOptions early_watch(const std::vector<std::string>& arguments);

/// The same, checked: Failure(usage).
WatchOptions read_watch(const boost::program_options::variables_map& values);

/// For EngineOptions::progress: notes each step where `world` keeps its Progress, then calls
/// `then`.
std::function<void(std::size_t)> noted(comm::Communicator& world,
                                       std::function<void(std::size_t)> then = {});
/// What those steps are, from now on.
void note_program(comm::Communicator& world, const Program& program);

}  // namespace dattn
