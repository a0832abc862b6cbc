#pragma once

#include <map>
#include <string>
#include <vector>

#include "launcher/flight.hpp"

namespace dattn {

/// What flight records say: who is the culprit, and why; several where several fit. The surest
/// sign decides: who failed; who left no record; who stood still; a link that is down; who hangs in
/// work of its own; who is at another collective, or in another phase, than the rest.
/// @pre there is a record
std::vector<std::string> culprits(const FlightRecords& records);

}  // namespace dattn
