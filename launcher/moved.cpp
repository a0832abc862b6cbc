#include "launcher/moved.hpp"

#include <fmt/format.h>

#include "parallel/verifying.hpp"

namespace dattn {
namespace {

/// A way in which bytes of a run move.
struct Way {
  const char* key;
  const char* words;
  Index (*bytes)(const RunTimes&);
};

constexpr Way kWays[] = {
    {"viewed", "looked at in place", [](const RunTimes& t) -> Index { return t.moved.viewed; }},
    {"copied", "copied once", [](const RunTimes& t) -> Index { return t.moved.copied; }},
    {"abroad", "to other hosts", [](const RunTimes& t) -> Index { return t.moved.abroad; }},
    {"rest", "by MPI within a host or in collectives",
     [](const RunTimes& t) -> Index {
       return t.bytes_sent - t.moved.viewed - t.moved.copied - t.moved.abroad;
     }},
};

Index envelopes(const RunReport& report, Pass pass) {
  Index sum = 0;
  for (const RankReport& rank : report.ranks) sum += rank.of(pass).front().envelopes;
  return sum;
}

}  // namespace

std::string verified_line(Index messages) {
  return fmt::format(
      "verified: {} messages as they were sent, by digests; {} beside what is sent\n", messages,
      in_bytes(messages * kEnvelopeBytes));
}

std::string verified_line(const RunReport& report, Pass pass) {
  return verified_line(envelopes(report, pass));
}

nlohmann::json verified_json(Index messages) {
  return {{"messages", messages}, {"envelope_bytes", messages * kEnvelopeBytes}};
}

nlohmann::json verified_json(const RunReport& report, Pass pass) {
  return verified_json(envelopes(report, pass));
}

std::string moved_line(const RunReport& report, Pass pass) {
  std::string line = "moved:";
  for (const Way& way : kWays) {
    Index sum = 0;
    for (const RankReport& rank : report.ranks) sum += way.bytes(rank.of(pass).front());
    line += fmt::format("{} {} {}", line.back() == ':' ? "" : ",", in_bytes(sum), way.words);
  }
  return line + "\n";
}

nlohmann::json moved_json(const RunReport& report, Pass pass) {
  nlohmann::json j;
  for (const Way& way : kWays) {
    for (const RankReport& rank : report.ranks) {
      j[way.key].push_back(way.bytes(rank.of(pass).front()));
    }
  }
  return j;
}

}  // namespace dattn
