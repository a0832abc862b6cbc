#pragma once

#include "kernels/isa/kernel.hpp"

namespace dattn::amx_emulated {

/// The kernel of amx.cpp with its tiles in memory: for tests on machines that have no AMX. Slow.
const Kernel& kernel();

}  // namespace dattn::amx_emulated
