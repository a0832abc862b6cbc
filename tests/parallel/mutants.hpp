#pragma once

#include <functional>
#include <string>

#include "parallel/plan.hpp"

namespace dattn {

/// Calls `visit` with every Plan that differs from `plan` by one mistake of the kinds listed in
/// mutants.cpp, and with the kind of mistake; plans are valid only during the call.
void each_mutant(const Plan& plan,
                 const std::function<void(const Plan&, const std::string& kind)>& visit);

}  // namespace dattn
