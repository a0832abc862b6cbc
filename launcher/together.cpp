#include "launcher/together.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <limits>
#include <vector>

#include "comm/error.hpp"
#include "comm/session.hpp"
#include "launcher/build.hpp"
#include "launcher/flight.hpp"
#include "launcher/limits.hpp"
#include "launcher/output_file.hpp"
#include "parallel/engine.hpp"

namespace dattn {
namespace {

constexpr const char* kOutOfMemory = "out of memory; use more ranks, or ask for less";

}  // namespace

void complain(int rank, const std::string& command, const std::string& what) {
  // Not fmt::print, which throws where nobody can read the line.
  std::fputs(fmt::format("[rank {}] {}: {}\n", rank, command, what).c_str(), stderr);
  std::fflush(stderr);
}

Exit code_of(const std::exception& failure) {
  if (dynamic_cast<const std::bad_alloc*>(&failure) != nullptr) return Exit::memory;
  if (dynamic_cast<const Corruption*>(&failure) != nullptr) return Exit::corrupt;
  const auto* step = dynamic_cast<const StepFailure*>(&failure);
  const bool late = dynamic_cast<const comm::Timeout*>(&failure) != nullptr ||
                    (step != nullptr && step->timed_out);
  return late ? Exit::timeout : Exit::internal;
}

Exit on_all_ranks(const std::string& command, const WatchOptions& watch,
                  const std::function<Exit(comm::Communicator&, comm::Watchdog&)>& body) {
  if (const auto note = shm_note()) std::fputs(("# NOTE: " + *note + "\n").c_str(), stderr);
  comm::Progress progress;
  Flight flight(command, watch.flight_dir, progress);
  comm::Watchdog watchdog(progress, watch.seconds, static_cast<int>(Exit::timeout),
                          [&](const comm::Watchdog::Verdict& v) { flight.report(v); });
  comm::Session session(&progress);
  comm::Communicator& world = session.world();
  // Where there is no memory, MPI_Abort would end with a code of its own.
  constexpr std::size_t kReserve = std::size_t{1} << 16;  // less than malloc gives back at once
  std::vector<std::byte> reserve(kReserve);
  // Others write down where they are before the job is aborted.
  const auto abort = [&](Exit exit, const std::string& what) {
    std::vector<std::byte>().swap(reserve);
    complain(world.rank(), command, what + flight.failed(what));
    watchdog.raise_failed();
    comm::Session::abort(static_cast<int>(exit));
  };
  try {
    flight.set_rank(world.rank(), world.size());
    world.set_deadline(std::numeric_limits<double>::infinity());
    watchdog.connect(world);
    require_agreement(world, build_signature(),
                      "install the same dattn and the same MPI on all hosts");
    return body(world, watchdog);
  } catch (const JobFailure& e) {
    if (world.rank() == e.rank) complain(world.rank(), command, e.what());
    return e.code;
  } catch (const Disagreement& e) {
    if (world.rank() == 0) complain(world.rank(), command, e.what());
    return Exit::usage;
  } catch (const std::bad_alloc&) {
    abort(Exit::memory, kOutOfMemory);
  } catch (const std::exception& e) {
    // This rank alone knows; whoever waits for it must not wait for ever.
    abort(code_of(e), e.what());
  }
  return Exit::internal;
}

void together(comm::Communicator& world, const std::function<void()>& part) {
  std::string report;  // exit code, a space and the line; empty when all went well
  const auto failed = [&](Exit exit, const char* what) {
    report = std::to_string(static_cast<int>(exit)) + " " + what;
  };
  try {
    part();
  } catch (const Failure& e) {
    failed(e.code, e.what());
  } catch (const std::bad_alloc&) {
    failed(Exit::memory, kOutOfMemory);
  }
  const std::vector<std::string> all = world.all_gather(report);
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].empty()) continue;
    const std::size_t space = all[r].find(' ');
    throw JobFailure(static_cast<Exit>(std::stoi(all[r].substr(0, space))),
                     all[r].substr(space + 1), static_cast<int>(r));
  }
}

std::string agree_on_outputs(comm::Communicator& world, const std::vector<std::string>& paths) {
  std::string job = std::to_string(::getpid());
  world.broadcast(job, 0);
  for (const std::string& path : paths) {
    if (!path.empty() && path != "-") expect_temporary(path, job);
  }
  world.barrier();  // nobody has begun before all expect it
  return job;
}

}  // namespace dattn
