#pragma once

#include <string>

#include "parallel/signature.hpp"

namespace dattn {

/// What this program was linked from, as its linker wrote it into it (GNU build-id): the same for
/// copies, another for anything else. "unknown" where the linker did not.
std::string build_id();

/// What must be the same on all ranks before they can understand each other: the version, the
/// build, and MPI's library.
Signature build_signature();

}  // namespace dattn
