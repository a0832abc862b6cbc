#pragma once

#include <string>

#include "launcher/program_options_fwd.hpp"

namespace dattn {

/// The option --verify-wire, of run, bench and decode.
boost::program_options::options_description verify_wire_option();

/// Whether it was given. Failure(usage) if this dattn has no digests.
bool verifies_wire(const boost::program_options::variables_map& values);

/// Failure(usage) that names `option` and the package if this dattn has no digests.
void require_digests(const char* option);

/// "with xxHash 0.8.1: ...", or that there is none and what that takes.
std::string digests_line();

}  // namespace dattn
