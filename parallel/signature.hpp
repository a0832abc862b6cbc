#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "comm/communicator.hpp"

namespace dattn {

/// Ranks were started with different problems; what() names a rank and the field, on all ranks.
struct Disagreement : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Fields that must be equal on all ranks: name and value.
using Signature = std::vector<std::pair<std::string, std::string>>;

/// Collective: throws Disagreement on all ranks unless all have the same fields with the same
/// values. `fix` says what to do about it.
void require_agreement(
    comm::Communicator& world, const Signature& own,
    const std::string& fix = "start all ranks with the same arguments and files");

}  // namespace dattn
