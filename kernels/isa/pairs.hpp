#pragma once

#include "kernels/isa/kernel.hpp"

namespace dattn::avx512_bf16 {

/// The kernel of pairs.cpp: bf16 only.
const Kernel& kernel();

}  // namespace dattn::avx512_bf16
