#pragma once

#include "comm/communicator.hpp"

namespace dattn::comm {

/// All ranks of the test job; a fresh communicator in every test, so that a failed test's messages
/// never meet the next one's. Valid within a test.
Communicator& world();

}  // namespace dattn::comm
