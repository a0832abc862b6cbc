#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "launcher/options.hpp"
#include "launcher/rank_report.hpp"
#include "launcher/verify.hpp"
#include "parallel/rehearse.hpp"

namespace dattn {

/// All that a run's report is made of, at rank 0.
struct RunReport {
  const Task* task = nullptr;
  const Choice* choice = nullptr;
  std::vector<Rehearsal> rehearsals;  ///< by pass
  std::vector<Index> slot_bytes;      ///< by rank; of all passes together
  nlohmann::json memory;              ///< what ranks need and what there is: memory_json()
  Machine machine;
  std::string isa;
  bool verify_wire = false;  ///< messages carried digests
  std::vector<RankReport> ranks;
  std::string windows_trouble;  ///< why ranks of a host do not see each other's memory; or empty
  std::optional<Verdict> verdict;
  std::optional<GradientVerdict> gradient_verdict;

  const Rehearsal& rehearsal(Pass pass) const { return rehearsals[static_cast<std::size_t>(pass)]; }
  /// Seconds of each run of a pass: its slowest rank's.
  std::vector<double> run_seconds(Pass pass) const;
  /// The run whose time is the median, over which phases are reported.
  std::size_t median_run(Pass pass) const;
};

/// The table of ranks, the plan in one line; before the run.
std::string heading(const RunReport& report);
/// Times, phases, bytes, rate; after it.
std::string results(const RunReport& report);
/// "check: ||O-Oref||/... = 0.31 (threshold 8) ...... PASSED"
std::string text(const Verdict& verdict);
std::string text(const GradientVerdict& verdict);
nlohmann::json to_json(const RunReport& report);
/// One header line and one row.
std::string to_csv(const RunReport& report);

/// The plan's part of every report, forward pass first; shared with `dattn plan`.
nlohmann::json plan_json(const Task& task, const Choice& choice,
                         const std::vector<Rehearsal>& rehearsals,
                         const std::vector<Index>& slot_bytes);
std::string plan_line(const Choice& choice, const Rehearsal& rehearsal, Pass pass);

/// What both passes together hold, and whether the second has what the first redistributed.
std::string memory_line(const Choice& choice, const std::vector<Index>& slot_bytes);

/// What is dropped, and what pseudo-keys stand for it. @pre the problem compensates
std::string compensation_line(const Problem& problem);

/// Chrome trace (chrome://tracing, Perfetto) of one run that began `from` seconds after the first:
/// one row a rank; made rank by rank.
std::string trace_events(const Program& program, const RunTimes& times, double from);
std::string trace_file(const std::vector<std::string>& events_of_ranks);

/// E.g. "1.5 MiB".
std::string in_bytes(Index bytes);

}  // namespace dattn
