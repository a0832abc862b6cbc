#pragma once

#include <span>

#include "comm/communicator.hpp"
#include "launcher/scores.hpp"
#include "launcher/tensors.hpp"
#include "parallel/plan.hpp"

namespace dattn {

/// How far results are from the double reference, over all ranks.
struct Verdict {
  Index rows = 0;             ///< query rows that were compared, with all their heads
  double relative_error = 0;  ///< ||O - Oref|| / ||Oref||, Frobenius over the compared rows
  double lse_error = 0;       ///< largest |LSE - LSEref| / max(1, |LSEref|)
  bool finite = true;         ///< no NaN or infinity where the reference has a number
  double epsilon = 0;         ///< unit of the element type, or of the wire's: 2^-7, 2^-23 or 2^-52
  double residual = 0;        ///< the larger error / epsilon
  double threshold = 0;       ///< bound of the residual
  bool passed() const { return finite && residual <= threshold; }
};

/// Collective: compares this rank's result `o`, `lse` (of `delivers`, dense) with the reference in
/// double on the inputs as stored: all rows where that is little work, rows spread evenly where it
/// is much. Keys and values pass by in pieces; no rank holds a whole tensor for it.
template <class T>
Verdict verify(comm::Communicator& world, const Problem& problem, const Block& delivers,
               const Source& source, const Scoring& scoring, std::span<const T> o,
               std::span<const T> lse);

/// Bytes that verify(), and with `gradients` verify_gradients(), takes of the rank of `forward`.
Index check_bytes(const Problem& problem, const Program& forward, bool gradients);

/// How far gradients are from the double reference, over all ranks.
struct GradientVerdict {
  Index query_rows = 0;  ///< rows of dQ that were compared, with all their heads
  Index key_rows = 0;    ///< and of dK and dV
  /// ||dQ - ref|| / ||ref||, Frobenius over the compared rows, and of dK and dV. What a query that
  /// sees a single key gives to dQ and dK cancels to 0; there the size of what cancels counts.
  double dq_error = 0, dk_error = 0, dv_error = 0;
  bool finite = true;    ///< no NaN or infinity where the reference has a number
  double epsilon = 0;    ///< as of a Verdict
  double residual = 0;   ///< the largest error / epsilon
  double threshold = 0;  ///< bound of the residual
  bool passed() const { return finite && residual <= threshold; }
};

/// One rank's results, dense: O, LSE and dQ of its query rows, dK and dV of its key rows.
template <class T>
struct Training {
  std::span<const T> o, lse, dq, dk, dv;
};

/// Collective: compares this rank's gradients (of `queries` and `keys`, its rows of O and of dK)
/// with the reference in double, in the manner of verify(). The reference of dK and dV has LSE and
/// delta of every query: in double from Q, K, V where a rank compares all its query rows, and those
/// of the run (which verify() judges by sample) where that is too much work.
template <class T>
GradientVerdict verify_gradients(comm::Communicator& world, const Problem& problem,
                                 const Block& queries, const Block& keys, const Source& source,
                                 const Scoring& scoring, const Training<T>& found);

}  // namespace dattn
