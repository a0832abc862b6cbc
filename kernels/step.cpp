#include "kernels/step.hpp"

#include <algorithm>
#include <numeric>

namespace dattn {

Index period(const Run& run, Index step) { return step / std::gcd(step, run.step); }

bool by_residues(const Runs& queries, const Runs& keys, Index step) {
  constexpr Index kRowsOfCall = 16;  // query rows of a part, in the mean
  if (step <= 1) return false;
  Index calls = 0;
  for (const Run& run : queries) calls += std::min(period(run, step), run.count);
  return calls * std::ssize(keys) <= 1 + size(queries) / kRowsOfCall;
}

}  // namespace dattn
