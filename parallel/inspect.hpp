#pragma once

#include <optional>

#include "parallel/rehearse.hpp"

namespace dattn {

/// What is wrong with one rank's Program by itself, before anything runs: slots, homes and peers
/// that do not exist, Blocks outside their tensor or their slot, kinds and rows that do not fit
/// together, inputs that the rank does not own or that a step would overwrite.
std::optional<Fault> inspect(const Problem& problem, const Program& program, int rank);

}  // namespace dattn
