#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "launcher/host.hpp"
#include "launcher/options.hpp"
#include "launcher/verify.hpp"
#include "parallel/engine.hpp"
#include "parallel/rehearse.hpp"

namespace dattn {

/// What every rank tells rank 0 about itself and its runs.
struct RankReport {
  Host host;
  int threads = 1;
  std::vector<RunTimes> runs;  ///< without their steps
};
std::string encoded(const RankReport& report);
RankReport decoded(const std::string& text);

/// All that a run's report is made of, at rank 0.
struct RunReport {
  const Task* task = nullptr;
  const Choice* choice = nullptr;
  const Rehearsal* rehearsal = nullptr;
  Machine machine;
  std::string isa;
  std::vector<RankReport> ranks;
  std::optional<Verdict> verdict;

  /// Seconds of each run: its slowest rank's.
  std::vector<double> run_seconds() const;
  /// The run whose time is the median, over which phases are reported.
  std::size_t median_run() const;
};

/// The table of ranks, the plan in one line; before the run.
std::string heading(const RunReport& report);
/// Times, phases, bytes, rate; after it.
std::string results(const RunReport& report);
/// "check: ||O-Oref||/... = 0.31 (threshold 8) ...... PASSED"
std::string text(const Verdict& verdict);
nlohmann::json to_json(const RunReport& report);
/// One header line and one row.
std::string to_csv(const RunReport& report);

/// The plan's part of every report; shared with `dattn plan`.
nlohmann::json plan_json(const Task& task, const Choice& choice, const Rehearsal& rehearsal);
std::string plan_line(const Choice& choice, const Rehearsal& rehearsal);

/// Chrome trace (chrome://tracing, Perfetto) of one run: one row a rank; made rank by rank.
std::string trace_events(const Program& program, const RunTimes& times);
std::string trace_file(const std::vector<std::string>& events_of_ranks);

/// E.g. "1.5 MiB".
std::string in_bytes(Index bytes);

}  // namespace dattn
