// dattn report: who brought a job down, from the flight records of its ranks.
#include <fmt/format.h>

#include <algorithm>

#include "launcher/commands.hpp"
#include "launcher/culprit.hpp"
#include "launcher/options.hpp"
#include "launcher/output_file.hpp"
#include "launcher/values.hpp"

namespace dattn {

Exit report_command(const std::vector<std::string>& arguments) {
  constexpr const char* kHelp =
      "dattn report DIR: who brought a job down, from the flight records in DIR, which the last "
      "lines\n"
      "of a job that was stuck or failed name. Records may be missing or cut off.\n";
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    write_text_file("-", kHelp);
    return Exit::ok;
  }
  if (arguments.size() != 1 || arguments.front().starts_with("-")) {
    throw Failure(Exit::usage,
                  "dattn report wants one folder of flight records, dattn report DIR; "
                  "the job's last lines name it");
  }
  const FlightRecords records = read_flight_records(arguments.front());
  const int ranks = records.ranks.begin()->second.ranks;
  std::string text =
      fmt::format("{}, {} ranks, {} records{}\n", records.ranks.begin()->second.command, ranks,
                  records.ranks.size(),
                  records.unreadable.empty()
                      ? ""
                      : fmt::format(", {} that cannot be read", records.unreadable.size()));
  text += fmt::format("{:>5} {:<20} {:>8}  where\n", "rank", "host", "pid");
  for (const auto& [r, record] : records.ranks) {
    text += fmt::format("{:>5} {:<20} {:>8}  {}\n", r, record.host, record.pid, record.place());
  }
  for (const std::string& line : culprits(records)) text += "culprit: " + line + "\n";
  write_text_file("-", text);
  return Exit::ok;
}

}  // namespace dattn
