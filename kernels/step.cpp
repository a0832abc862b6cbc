#include "kernels/step.hpp"

#include <algorithm>
#include <numeric>

namespace dattn {

Index period(const Run& run, Index step) { return step / std::gcd(step, run.step); }

std::map<Index, Runs> by_residue(const Runs& runs, Index step) {
  std::map<Index, Runs> found;
  for (const Run& run : runs) {
    const Index every = period(run, step);
    for (Index i = 0; i < std::min(every, run.count); ++i) {
      const Index residue = (run.at(i) % step + step) % step;
      found[residue].push_back({run.at(i), (run.count - i + every - 1) / every, run.step * every});
    }
  }
  return found;
}

bool by_residues(const Runs& queries, const Runs& keys, Index step) {
  constexpr Index kRowsOfCall = 16;  // query rows of a part, in the mean
  if (step <= 1) return false;
  Index calls = 0;
  for (const Run& run : queries) calls += std::min(period(run, step), run.count);
  return calls * std::ssize(keys) <= 1 + size(queries) / kRowsOfCall;
}

}  // namespace dattn
