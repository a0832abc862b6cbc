#include "bench/rows.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "launcher/report.hpp"

namespace dattn {
namespace {

using nlohmann::ordered_json;

/// A figure that was measured and means something; JSON has no NaN.
ordered_json figure(double value) {
  return std::isfinite(value) && value > 0 ? ordered_json(value) : ordered_json();
}

double median(const std::vector<Sample>& samples, double (*of)(const Sample&)) {
  std::vector<double> values;
  for (const Sample& s : samples) values.push_back(of(s));
  return dattn::median(std::move(values));
}

std::string csv_text(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) out += c == '"' ? std::string("\"\"") : std::string(1, c);
  return out + '"';
}

}  // namespace

std::string shown(double value, int digits) {
  return std::isfinite(value) && value > 0 ? fmt::format("{:.{}f}", value, digits) : "-";
}

void Row::measured(const std::vector<Sample>& samples) {
  repeats = static_cast<int>(samples.size());
  // Phases have to add up, so all are of one repeat: the one in the middle.
  std::vector<Sample> sorted = samples;
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const Sample& a, const Sample& b) { return a.seconds < b.seconds; });
  const Sample& middle = sorted[(sorted.size() - 1) / 2];
  seconds = middle.seconds;
  seconds_min = sorted.front().seconds;
  seconds_max = sorted.back().seconds;
  compute = middle.compute;
  exposed = middle.exposed;
  hidden = middle.hidden;
  bytes = middle.bytes;
  messages = middle.messages;
  ideal_busy = median(samples, [](const Sample& s) { return s.ideal_busy; });
  ideal_slowest = median(samples, [](const Sample& s) { return s.ideal_slowest; });
  ideal_alone = median(samples, [](const Sample& s) { return s.ideal_alone; });
  // Of each repeat by itself: what slows the machine down for a while slows down both.
  of_ideal_busy = median(samples, [](const Sample& s) { return s.ideal_busy / s.seconds; });
  of_ideal_slowest = median(samples, [](const Sample& s) { return s.ideal_slowest / s.seconds; });
  of_ideal_alone = median(samples, [](const Sample& s) { return s.ideal_alone / s.seconds; });
}

ordered_json fields(const Row& row) {
  const Shape& s = row.shape;
  ordered_json j{{"strategy", row.strategy},
                 {"partition", row.partition},
                 {"mesh", row.mesh},
                 {"ranks", row.ranks},
                 {"threads", row.threads},
                 {"tokens", s.keys},
                 {"queries", s.queries},
                 {"heads", s.query_heads},
                 {"kv_heads", s.key_heads},
                 {"d", s.d_qk},
                 {"dv", s.d_v},
                 {"mask", row.mask},
                 {"pass", row.pass}};
  const bool ran = row.refused.empty();
  const auto add = [&](const char* name, const ordered_json& value) {
    j[name] = ran ? value : ordered_json();
  };
  add("prefetch", row.prefetch);
  add("seconds", row.seconds);
  add("seconds_min", row.seconds_min);
  add("seconds_max", row.seconds_max);
  add("of_ideal_busy", figure(row.of_ideal_busy));
  add("of_ideal_slowest", figure(row.of_ideal_slowest));
  add("of_ideal_alone", figure(row.of_ideal_alone));
  add("ideal_busy_seconds", figure(row.ideal_busy));
  add("ideal_slowest_seconds", figure(row.ideal_slowest));
  add("ideal_alone_seconds", figure(row.ideal_alone));
  add("compute_seconds", row.compute);
  add("exposed_seconds", row.exposed);
  add("other_seconds", std::max(0.0, row.seconds - row.compute - row.exposed));
  add("exposed_share", row.exposed / row.seconds);
  add("hidden_seconds", row.hidden);
  add("bytes_per_rank", static_cast<Index>(row.bytes));
  add("messages", static_cast<Index>(row.messages));
  add("forecast_seconds", row.forecast);
  add("forecast_over_measured", row.forecast / row.seconds);
  add("speedup", figure(row.speedup));
  add("efficiency", figure(row.speedup / row.ranks));
  add("gflops", row.gflops());
  add("plan_memory_bytes", row.memory);
  add("repeats", row.repeats);
  j["refused"] = ran ? ordered_json() : ordered_json(row.refused);
  return j;
}

std::string to_csv(const std::vector<ordered_json>& rows) {
  std::string out;
  for (const ordered_json& columns : rows) {
    if (out.empty()) {
      for (const auto& [name, value] : columns.items()) out += (out.empty() ? "" : ",") + name;
      out += '\n';
    }
    bool first = true;
    for (const auto& [name, value] : columns.items()) {
      if (!first) out += ',';
      first = false;
      if (value.is_string()) {
        out += csv_text(value.get<std::string>());
      } else if (!value.is_null()) {
        out += value.dump();
      }
    }
    out += '\n';
  }
  return out;
}

std::string to_table(const std::vector<Row>& rows) {
  std::string out = fmt::format(
      "{:<14} {:<10} {:<6} {:<16} {:>9} {:>6} {:>6} {:>6} {:>9} {:>6} {:>9} {:>11} {:>6} {:>8} "
      "{:>7} "
      "{:>8} {:>10}\n",
      "strategy", "partition", "mesh", "pass", "seconds", "%busy", "%slow", "%alone", "exposed",
      "share", "hidden", "sent/rank", "msgs", "forecast", "speedup", "GFLOP/s", "plan mem");
  for (const Row& r : rows) {
    if (!r.refused.empty()) {
      out += fmt::format("{:<14} refused: {}\n", r.strategy, r.refused);
      continue;
    }
    out += fmt::format(
        "{:<14} {:<10} {:<6} {:<16} {:>9.5f} {:>6} {:>6} {:>6} {:>9.5f} {:>5.1f}% {:>9.5f} {:>11} "
        "{:>6} "
        "{:>8.2f} {:>7} {:>8.1f} {:>10}\n",
        r.strategy, r.partition, r.mesh, r.pass, r.seconds, shown(100 * r.of_ideal_busy, 1),
        shown(100 * r.of_ideal_slowest, 1), shown(100 * r.of_ideal_alone, 1), r.exposed,
        100 * r.exposed / r.seconds, r.hidden, in_bytes(static_cast<Index>(r.bytes)),
        static_cast<Index>(r.messages), r.forecast / r.seconds, shown(r.speedup, 2), r.gflops(),
        in_bytes(r.memory));
  }
  return out;
}

}  // namespace dattn
