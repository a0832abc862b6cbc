#include "kernels/step.hpp"

#include <algorithm>
#include <numeric>

namespace dattn {

Index period(const Run& run, Index step) { return step / std::gcd(step, run.step); }

namespace {

Index residue_of(Index position, Index step) { return (position % step + step) % step; }

/// The members of the residue of the i-th one, which is the first. One alone may be any step from
/// the next, and its own times the period may be more than an Index.
Run every(const Run& run, Index step, Index i) {
  const Index p = period(run, step);
  const Index count = (run.count - i + p - 1) / p;
  return {run.at(i), count, count > 1 ? run.step * p : step};
}

}  // namespace

std::map<Index, Runs> by_residue(const Runs& runs, Index step) {
  std::map<Index, Runs> found;
  for (const Run& run : runs) {
    for (Index i = 0; i < std::min(period(run, step), run.count); ++i) {
      found[residue_of(run.at(i), step)].push_back(every(run, step, i));
    }
  }
  return found;
}

Runs of_residue(const Runs& runs, Index step, Index residue) {
  Runs found;
  for (const Run& run : runs) {
    const Index end = std::min(period(run, step), run.count);
    Index i = run.step == 1 ? residue_of(residue - run.first, step) : 0;
    while (i < end && residue_of(run.at(i), step) != residue) ++i;
    if (i < end) found.push_back(every(run, step, i));
  }
  return found;
}

bool by_residues(const Runs& queries, const Runs& keys, Index step) {
  constexpr Index kRowsOfCall = 16;   // query rows of a part, in the mean;
  constexpr Index kKeysOfCall = 256;  // of fewer rows, keys
  if (step <= 1) return false;
  if (size(queries) <= kRowsOfCall && keys.size() == 1 && size(keys) / step >= kKeysOfCall) {
    return true;
  }
  Index calls = 0;
  for (const Run& run : queries) calls += std::min(period(run, step), run.count);
  return calls * std::ssize(keys) <= 1 + size(queries) / kRowsOfCall;
}

}  // namespace dattn
