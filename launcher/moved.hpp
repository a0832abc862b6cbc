#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "launcher/report.hpp"

namespace dattn {

/// How what a pass sent has moved, over all ranks, e.g. "moved: 1.5 MiB looked at in place, ...".
std::string moved_line(const RunReport& report, Pass pass);
/// The same in bytes, by rank.
nlohmann::json moved_json(const RunReport& report, Pass pass);

/// What --verify-wire has compared in a pass, and the bytes that it took beside those sent.
std::string verified_line(const RunReport& report, Pass pass);
nlohmann::json verified_json(const RunReport& report, Pass pass);
/// The same of so many messages.
std::string verified_line(Index messages);
nlohmann::json verified_json(Index messages);

}  // namespace dattn
