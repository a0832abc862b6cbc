#pragma once

#include <span>

#include "comm/communicator.hpp"
#include "launcher/tensors.hpp"
#include "parallel/plan.hpp"

namespace dattn {

/// How far results are from the double reference, over all ranks.
struct Verdict {
  Index rows = 0;             ///< query rows that were compared, with all their heads
  double relative_error = 0;  ///< ||O - Oref|| / ||Oref||, Frobenius over the compared rows
  double lse_error = 0;       ///< largest |LSE - LSEref| / max(1, |LSEref|)
  bool finite = true;         ///< no NaN or infinity where the reference has a number
  double epsilon = 0;         ///< unit of the element type: 2^-23 or 2^-52
  double residual = 0;        ///< the larger error / epsilon
  double threshold = 0;       ///< bound of the residual
  bool passed() const { return finite && residual <= threshold; }
};

/// Collective: compares this rank's result `o`, `lse` (of `delivers`, dense) with the reference in
/// double on the inputs as stored: all rows where that is little work, rows spread evenly where it
/// is much. Keys and values pass by in pieces; no rank holds a whole tensor for it.
template <class T>
Verdict verify(comm::Communicator& world, const Problem& problem, const Block& delivers,
               const Source& source, double scale, std::span<const T> o, std::span<const T> lse);

}  // namespace dattn
