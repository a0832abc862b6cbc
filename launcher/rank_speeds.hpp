#pragma once

#include <string>

#include "comm/communicator.hpp"
#include "launcher/options.hpp"
#include "launcher/program_options_fwd.hpp"

namespace dattn {

/// The option that says how fast ranks are; for run, plan, bench and bench_strategies.
boost::program_options::options_description speeds_option();

/// In place of a list: ranks measure.
inline constexpr const char* kMeasuredSpeeds = "measured";

/// Whether ranks are to measure their speeds.
bool speeds_are_measured(const Task& task);

/// What --rank-speeds says of `ranks` ranks; all are equal if it was not given. Failure(usage) if
/// it is no list for them, or says that they are measured.
Speeds speeds_from(const std::string& words, int ranks);

/// Collective: the same, or what measure_speeds() finds. The same on all ranks. Throws JobFailure
/// on all ranks.
Speeds speeds_of(comm::Communicator& world, const Task& task, int threads);

/// "speeds of ranks: 1,0.5, measured; ...\n": what reports say of them, and how to have the same
/// plan again; of a task nothing where nobody asked.
std::string speeds_line(bool measured, const Speeds& speeds);
std::string speeds_line(const Task& task, const Speeds& speeds);

}  // namespace dattn
