#include "kernels/step.hpp"

#include <algorithm>
#include <numeric>

namespace dattn {

Index period(const Run& run, Index step) { return step / std::gcd(step, run.step); }

namespace {

Index residue_of(Index position, Index step) { return (position % step + step) % step; }

/// Every so many members of a run from the i-th on.
Run every(const Run& run, Index period, Index i) {
  return {run.at(i), (run.count - i + period - 1) / period, run.step * period};
}

}  // namespace

std::map<Index, Runs> by_residue(const Runs& runs, Index step) {
  std::map<Index, Runs> found;
  for (const Run& run : runs) {
    const Index p = period(run, step);
    for (Index i = 0; i < std::min(p, run.count); ++i) {
      found[residue_of(run.at(i), step)].push_back(every(run, p, i));
    }
  }
  return found;
}

Runs of_residue(const Runs& runs, Index step, Index residue) {
  Runs found;
  for (const Run& run : runs) {
    const Index p = period(run, step);
    Index i = run.step == 1 ? residue_of(residue - run.first, step) : 0;
    while (i < std::min(p, run.count) && residue_of(run.at(i), step) != residue) ++i;
    if (i < std::min(p, run.count)) found.push_back(every(run, p, i));
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
