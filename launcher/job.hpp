#pragma once

#include <functional>
#include <string>

#include "comm/communicator.hpp"
#include "comm/watchdog.hpp"
#include "launcher/failure.hpp"
#include "launcher/options.hpp"
#include "launcher/report.hpp"
#include "launcher/watch.hpp"

namespace dattn {

/// What `dattn run` was told to do.
struct RunOptions {
  Task task;
  int threads = 0;  ///< 0: choose
  int repeat = 1;
  int warmup = 0;
  bool check = false;
  WatchOptions watch;
  bool windows = true;  ///< ranks of a host see each other's memory
  bool verify_wire = false;  ///< messages carry digests
  std::string out, lse, dq, dk, dv, json, csv, trace, manifest;
  std::string q, k, v, grad;  ///< files of inputs, for the manifest; empty: generated
  /// Rank 0: takes the report in place of files and text, if it is there.
  std::function<void(const RunReport&)> report;

  /// Standard output is for people unless a report goes there.
  bool quiet() const { return json == "-" || csv == "-" || trace == "-"; }
};

/// The task, threads, runs, check and watchdog that the options of `run` and `bench` ask for.
/// Failure(usage or input) as make_task() and at_most() have it.
RunOptions read_work(const boost::program_options::variables_map& values);

/// Collective: the job from the choice of a plan to the last file. Throws JobFailure on all ranks
/// for what all know of. Makes the watchdog as patient as the forecast asks. @pre the ranks agree on
/// the options
Exit run_job(comm::Communicator& world, comm::Watchdog& watchdog, const RunOptions& options);

}  // namespace dattn
