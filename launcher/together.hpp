#pragma once

#include <functional>
#include <new>
#include <string>
#include <vector>

#include "comm/communicator.hpp"
#include "comm/watchdog.hpp"
#include "launcher/failure.hpp"
#include "launcher/watch.hpp"
#include "parallel/signature.hpp"

namespace dattn {

/// A Failure that all ranks know of; `rank` is the one that has to say it.
struct JobFailure : Failure {
  JobFailure(Exit exit, std::string_view what, int rank_in) : Failure(exit, what), rank(rank_in) {}
  int rank;
};

/// "[rank R] COMMAND: what" on standard error.
void complain(int rank, const std::string& command, const std::string& what);

/// The exit code for what one rank alone has met.
Exit code_of(const std::exception& failure);

/// Opens the session of a command that runs under mpirun, does `body` on every rank and gives its
/// exit code. Failures end in one line of the rank concerned and their exit codes; where one rank
/// alone knows of one, the job is aborted. A watchdog ends the job when no rank moves, which is the
/// one bound on all waits. `body` may make it more patient.
Exit on_all_ranks(const std::string& command, const WatchOptions& watch,
                  const std::function<Exit(comm::Communicator&, comm::Watchdog&)>& body);

/// Collective: runs `part` on every rank, then throws the same JobFailure on all ranks if it failed
/// on any, the lowest one's. So no rank goes on alone into a step that the others never reach.
void together(comm::Communicator& world, const std::function<void()>& part);

/// Collective: what tells the temporaries of two jobs that write the same file apart, OutputFile's
/// job_id: rank 0's process number. From now on every rank that is told to end removes what rank 0
/// has begun to write at `paths` (empty ones are left out), whichever rank dies.
std::string agree_on_outputs(comm::Communicator& world, const std::vector<std::string>& paths);

}  // namespace dattn
