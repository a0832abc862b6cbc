#include "parallel/pairs.hpp"

#include <algorithm>

namespace dattn {

namespace {

/// Spans are kept until they take this much: masks of many spans a row would fill the memory.
constexpr Index kMostRowsBytes = Index{512} << 20;

/// Seconds in which a forward kernel asks a mask what a run of queries sees of a run of keys: what
/// counts where both lie in many runs, as those of balanced partitions by head do (bench_forecast).
constexpr double kLookSeconds = 7.5e-8;

/// Query heads that share a key head and a value head.
Index group_of(const Shape& shape) {
  return shape.query_heads / std::max(shape.key_heads, shape.value_heads);
}

}  // namespace

template <class Answer, class Find, class Visit>
void PairCounter::over_heads(LastOf<Answer>& known, const Ranges& heads, const Ranges& query_rows,
                             const Ranges& key_rows, const Find& find, const Visit& visit) {
  for (const Range range : heads) {
    for (const auto& [head, times] : variants(problem_.mask(), range)) {
      Last<Answer>& last = known[problem_.mask().variant(head)];
      if (last.query_rows != query_rows || last.key_rows != key_rows) {
        last = {query_rows, key_rows, find(head)};
      }
      visit(last.answer, times);
    }
  }
}

Index PairCounter::count(const Ranges& heads, const Ranges& query_rows, const Ranges& key_rows) {
  Index sum = 0;
  over_heads(
      last_, heads, query_rows, key_rows,
      [&](Index head) { return count(head, query_rows, key_rows); },
      [&](Index pairs, Index times) { sum += times * pairs; });
  return sum;
}

Index PairCounter::count(Index head, const Ranges& query_rows, const Ranges& key_rows) {
  const Mask& mask = problem_.mask();
  return problem_.counts().pairs.of({mask.variant(head)}, query_rows, key_rows, [&] {
    const Runs keys = problem_.keys().positions(key_rows);
    return dense(keys) || mask.step(head) > 1
               ? area(mask, head, problem_.queries().positions(query_rows), keys)
               : spans(head, query_rows, keys).area(keys);
  });
}

Index PairCounter::seeing(Index head, const Ranges& query_rows, const Ranges& key_rows) {
  const Mask& mask = problem_.mask();
  return problem_.counts().rows.of({mask.variant(head)}, query_rows, key_rows, [&] {
    const Runs keys = problem_.keys().positions(key_rows);
    return dense(keys) || mask.step(head) > 1
               ? rows_seeing(mask, head, problem_.queries().positions(query_rows), keys)
               : spans(head, query_rows, keys).seeing(keys);
  });
}

const RowSpans& PairCounter::spans(Index head, const Ranges& query_rows, const Runs& keys) {
  const std::tuple key(problem_.mask().variant(head), query_rows);
  auto found = rows_.find(key);
  if (found == rows_.end()) {
    const Index step = std::max_element(keys.begin(), keys.end(), [](const Run& a, const Run& b) {
                         return a.step < b.step;
                       })->step;
    if (rows_bytes_ > kMostRowsBytes) {
      rows_.clear();
      rows_bytes_ = 0;
    }
    found = rows_
                .try_emplace(key, problem_.mask(), head, problem_.queries().positions(query_rows),
                             Range{0, problem_.shape().keys}, step)
                .first;
    rows_bytes_ += found->second.bytes();
  }
  return found->second;
}

Index PairCounter::query_bytes(Pass pass, const Ranges& heads, const Ranges& query_rows,
                               const Ranges& key_rows) {
  const Shape& shape = problem_.shape();
  const auto per_row = [&](std::span<const Kind> kinds) {
    Index bytes = 0;
    for (const Kind kind : kinds) bytes += record_bytes(kind, shape, problem_.type());
    return bytes;
  };
  Index rows = 0;  // that see a key, of all heads
  over_heads(
      last_rows_, heads, query_rows, key_rows,
      [&](Index head) { return seeing(head, query_rows, key_rows); },
      [&](Index some, Index times) { rows += times * some; });
  const Side side = query_side(pass);
  return rows * (per_row(side.inputs) + 2 * per_row(side.sums));
}

Index PairCounter::key_bytes(Pass pass, const Ranges& heads, const Ranges& key_rows) const {
  const Shape& shape = problem_.shape();
  Index bytes = 0;
  const Side side = key_side(pass);
  for (const auto& [kinds, times] : {std::pair{side.inputs, 1}, std::pair{side.sums, 2}}) {
    for (const Kind kind : kinds) {
      bytes += times * size(key_rows) * size(heads_touched(kind, heads, shape)) *
               record_bytes(kind, shape, problem_.type());
    }
  }
  return bytes;
}

Extra PairCounter::extra(const Ranges& heads, const Ranges& query_rows, const Ranges& key_rows,
                         const Machine& machine) {
  // Of many ranks a rank's blocks are many, and small.
  constexpr Index kSamples = 16;
  constexpr Index kFewSamples = 4;
  constexpr int kManyRanks = 64;
  const Shape& shape = problem_.shape();
  const Mask& mask = problem_.mask();
  Extra sum;
  over_heads(
      last_extra_, heads, query_rows, key_rows,
      [&](Index head) -> Extra {
        // Heads that share keys lie side by side in a register, if they see the same.
        const Index group = group_of(shape);
        const bool alike = mask.variant(head) == mask.variant(head / group * group);
        const Index together = alike ? std::min(group, size(heads)) : 1;
        const Grain grain = machine.grain();
        return problem_.counts().extra.of(
            {mask.variant(head), together, grain.lanes, grain.granule}, query_rows, key_rows, [&] {
              return extra_pairs(mask, head, problem_.queries().positions(query_rows),
                                 problem_.keys().positions(key_rows), grain, together,
                                 problem_.ranks() > kManyRanks ? kFewSamples : kSamples);
            });
      },
      [&](const Extra& one, Index times) {
        sum.beside += static_cast<double>(times) * one.beside;
        sum.masked += static_cast<double>(times) * one.masked;
      });
  return sum;
}

double PairCounter::seconds(Pass pass, const Ranges& heads, const Ranges& query_rows,
                            const Ranges& key_rows, Index pairs, const Machine& machine) {
  const Shape& shape = problem_.shape();
  const bool forward = pass == Pass::forward;
  const double of_pair = forward ? shape.flops_per_pair() / machine.rate
                                 : shape.backward_flops_per_pair() / machine.backward();
  auto taken = static_cast<double>(pairs);
  if (machine.lanes > 0 && pairs < size(heads) * size(query_rows) * size(key_rows)) {
    const Extra more = extra(heads, query_rows, key_rows, machine);
    taken += more.beside + (forward ? kMaskedForward : kMaskedBackward) * more.masked;
  }
  double seconds = taken * of_pair;
  if (machine.lanes > 0 && forward) {
    const std::size_t looks = problem_.queries().positions(query_rows).size() *
                              problem_.keys().positions(key_rows).size();
    const Index group = group_of(shape);
    const auto groups = static_cast<double>((size(heads) + group - 1) / group);
    if (looks > 1) seconds += groups * static_cast<double>(looks) * kLookSeconds;
  }
  if (machine.rows > 0) {
    seconds += static_cast<double>(query_bytes(pass, heads, query_rows, key_rows)) / machine.rows;
  }
  const double packs = machine.packs > 0 ? machine.packs : machine.rows;
  if (packs > 0) seconds += static_cast<double>(key_bytes(pass, heads, key_rows)) / packs;
  return seconds;
}

Ranges heads_served(const Program& program, SlotId q, SlotId k, SlotId v, const Shape& shape) {
  const auto heads = [&](SlotId s) -> const Ranges& {
    return program.slots[static_cast<std::size_t>(s)].block.heads;
  };
  return intersect(heads(q), intersect(query_heads_of(Kind::K, heads(k), shape),
                                       query_heads_of(Kind::V, heads(v), shape)));
}

}  // namespace dattn
