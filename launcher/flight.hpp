#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "comm/watchdog.hpp"

namespace dattn {

/// Why a flight record was written.
enum class Cause {
  stuck,  ///< nothing moved any more
  failed  ///< this rank met an error that it alone knew of
};

/// What one rank knew when a job ended badly.
struct FlightRecord {
  Cause cause = Cause::stuck;
  bool told = false;  ///< another rank has noticed
  std::string command = {};
  int rank = 0;
  int ranks = 1;
  std::string host = {};
  int pid = 0;
  std::string line = {};         ///< what the rank said
  double now = 0;                ///< seconds, on the clock of the events
  double seconds = 0;            ///< since anything had moved
  double paused = 0;             ///< seconds for which the whole process stood still before
  std::vector<int> silent = {};  ///< ranks that were heard no more
  std::vector<comm::Progress::Event> events = {};

  /// Where the rank is: null if it has no events.
  const comm::Progress::Event* at() const { return events.empty() ? nullptr : &events.back(); }
  /// Its last step in the phase that it is in; null if there is none.
  const comm::Progress::Event* step() const;
  /// "forward pass, step 5 (recv ...), waiting for a receive of 24 bytes from rank 2 for 61 s"
  std::string place() const;
};

nlohmann::json to_json(const FlightRecord& record);
/// Throws nlohmann::json::exception where it is none.
FlightRecord flight_record(const nlohmann::json& json);

/// Writes the flight records of one rank.
class Flight {
 public:
  /// `folder` empty: one named after the job, as its launcher has it. Rank and number of ranks are
  /// those that the launcher says, until set.
  Flight(std::string command, std::string folder, const comm::Progress& progress);

  void set_rank(int rank, int ranks);

  /// The watchdog's report: one line on standard error where `verdict` is that nothing moves, and
  /// the record. Removes unfinished output files. For any thread.
  void report(const comm::Watchdog::Verdict& verdict) const noexcept;
  /// Writes the record of a rank that failed; gives what to add to its line.
  std::string failed(const std::string& line) const noexcept;

 private:
  FlightRecord here() const;
  /// Empty, or why not.
  std::string write(const FlightRecord& record) const;
  /// To be added to a line.
  std::string write_and_say(const FlightRecord& record) const;

  std::string command_;
  std::string folder_;
  const comm::Progress& progress_;
  int rank_ = 0;
  int ranks_ = 1;
  std::string host_;
};

/// The records in a folder, by rank; and the names of those that cannot be read.
struct FlightRecords {
  std::map<int, FlightRecord> ranks;
  std::vector<std::string> unreadable;
};

/// Failure(input) if the folder cannot be read, or has no record.
FlightRecords read_flight_records(const std::string& folder);

}  // namespace dattn
