#include "kernels/residues.hpp"

#include <numeric>

#include "kernels/step.hpp"

namespace dattn {
namespace {

/// Part of a run: the members of one residue.
struct Class {
  EveryRow rows;
  Run run;
};

/// The members `first`, first + period, ... of a run that begins `before` rows into the block.
Class class_of(const Run& run, Index before, Index first, Index period) {
  const Index count = (run.count - first + period - 1) / period;
  return {{before + first, period, count}, {run.at(first), count, run.step * period}};
}

Index residue(Index position, Index step) { return (position % step + step) % step; }

}  // namespace

std::vector<Residue> residues_of(const Where& where, const Mask& mask) {
  Index step = 0;
  for (Index h = where.query_heads.begin; h < where.query_heads.end; ++h) {
    step = std::gcd(step, mask.step(h));
  }
  if (!by_residues(where.queries, where.keys, step)) return {};

  std::vector<Residue> found;
  Index q_before = 0;
  for (const Run& q : where.queries) {
    const Index q_period = period(q, step);
    for (Index i = 0; i < std::min(q_period, q.count); ++i) {
      Index k_before = 0;
      for (const Run& k : where.keys) {
        const Index k_period = period(k, step);
        Index j = 0;
        while (j < std::min(k_period, k.count) &&
               residue(k.at(j), step) != residue(q.at(i), step)) {
          ++j;
        }
        if (j < std::min(k_period, k.count)) {
          const Class queries = class_of(q, q_before, i, q_period);
          const Class keys = class_of(k, k_before, j, k_period);
          Where part = where;
          part.queries = {queries.run};
          part.keys = {keys.run};
          part.key_weights = keys.rows.of(where.key_weights);
          found.push_back({queries.rows, keys.rows, part});
        }
        k_before += k.count;
      }
    }
    q_before += q.count;
  }
  return found;
}

bool steps_differ(const Where& where, const Mask& mask) {
  const Index first = where.query_heads.begin;
  bool alike = true;
  bool some_apart = false;
  for (Index h = first; h < where.query_heads.end; ++h) {
    if (mask.step(h) != mask.step(first)) return true;
    alike = alike && mask.variant(h) == mask.variant(first);
    some_apart = some_apart || !mask.apart(h).empty();
  }
  return some_apart && !alike;
}

std::vector<MaskPtr> apart(const Where& where, const Mask& mask) {
  const Index head = where.query_heads.begin;
  std::vector<MaskPtr> masks = mask.apart(head);
  if (!masks.empty() && !by_residues(where.queries, where.keys, masks.back()->step(head))) {
    masks.clear();
  }
  return masks;
}

}  // namespace dattn
