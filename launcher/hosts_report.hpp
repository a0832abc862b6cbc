#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "parallel/planner.hpp"

namespace dattn {

/// A line on which ranks share hosts and what a pass moves inside hosts and from host to host;
/// empty if all are on one.
std::string hosts_line(const Choice& choice, const Rehearsal& rehearsal);

/// Which rank is on which host, and whether blocks go to a host once.
nlohmann::json hosts_json(const Choice& choice);
/// Bytes from host to host; inside one where both are the same.
nlohmann::json host_links_json(const Rehearsal& rehearsal);

}  // namespace dattn
