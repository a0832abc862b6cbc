#include "launcher/rank_report.hpp"

#include <nlohmann/json.hpp>

namespace dattn {
namespace {

using nlohmann::json;

json runs_to_json(const std::vector<RunTimes>& all) {
  json runs = json::array();
  for (const RunTimes& t : all) {
    runs.push_back({t.seconds, t.compute, t.wait, t.hidden, t.bytes_sent, t.messages,
                    t.moved.viewed, t.moved.copied, t.moved.abroad, t.between_hosts, t.envelopes});
  }
  return runs;
}

json limits_to_json(const std::vector<Limit>& all) {
  json limits = json::array();
  for (const Limit& limit : all) limits.push_back({limit.name, limit.left, limit.shared});
  return limits;
}

std::vector<RunTimes> runs_of_json(const json& all) {
  std::vector<RunTimes> runs;
  for (const json& run : all) {
    RunTimes t;
    t.seconds = run.at(0), t.compute = run.at(1), t.wait = run.at(2), t.hidden = run.at(3);
    t.bytes_sent = run.at(4), t.messages = run.at(5);
    t.moved = {run.at(6), run.at(7), run.at(8)};
    t.between_hosts = run.at(9), t.envelopes = run.at(10);
    runs.push_back(std::move(t));
  }
  return runs;
}

}  // namespace

std::string encoded(const RankReport& report) {
  return json{{"host", report.host.name},
              {"pid", report.host.pid},
              {"cpus", report.host.cpus},
              {"cpu_count", report.host.cpu_count},
              {"threads", report.threads},
              {"limits", limits_to_json(report.host.limits)},
              {"took", report.took},
              {"runs", runs_to_json(report.runs)},
              {"backward_runs", runs_to_json(report.backward_runs)}}
      .dump();
}

RankReport decoded(const std::string& text) {
  const json j = json::parse(text);
  RankReport report;
  report.host = {j.at("host"), j.at("pid"), j.at("cpus"), j.at("cpu_count"), {}};
  for (const json& limit : j.at("limits")) {
    report.host.limits.push_back({limit.at(0), limit.at(1), limit.at(2)});
  }
  report.threads = j.at("threads");
  report.took = j.at("took");
  report.runs = runs_of_json(j.at("runs"));
  report.backward_runs = runs_of_json(j.at("backward_runs"));
  return report;
}

}  // namespace dattn
