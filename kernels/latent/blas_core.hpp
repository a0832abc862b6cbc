#pragma once

namespace dattn {

/// The processor whose kernels OpenBLAS has taken, in its words, e.g. "SkylakeX".
const char* blas_core();

/// Has OpenBLAS take kernels for what this processor can do, if it has not. Versions that do not
/// know a processor take it for an old one: 0.3.21 has AVX2 for Sapphire Rapids, and SSE3 on virtual
/// machines that hide some of what it can. It chooses once, when it is loaded, so the program is
/// started anew with OPENBLAS_CORETYPE in its environment; where a user has set that, nothing
/// happens. First of all in main(), whose arguments these are.
void choose_blas_core(char** arguments);

}  // namespace dattn
