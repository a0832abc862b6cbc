#pragma once

#include "parallel/strategies.hpp"

namespace dattn {

Strategy lightseq_strategy();

}  // namespace dattn
