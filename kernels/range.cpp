#include "kernels/range.hpp"

namespace dattn {

Index size(const Ranges& ranges) {
  Index sum = 0;
  for (const Range r : ranges) sum += r.size();
  return sum;
}

void append(Ranges& ranges, Range next) {
  if (next.empty()) return;
  if (!ranges.empty() && ranges.back().end == next.begin) {
    ranges.back().end = next.end;
  } else {
    ranges.push_back(next);
  }
}

void append(std::vector<Range>& ranges, std::size_t first, Range next) {
  if (next.empty()) return;
  if (ranges.size() > first && ranges.back().end == next.begin) {
    ranges.back().end = next.end;
  } else {
    ranges.push_back(next);
  }
}

Ranges union_of(std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end());
  Ranges out;
  for (const Range next : ranges) {
    const Index from = out.empty() ? next.begin : std::max(out.back().end, next.begin);
    append(out, {from, next.end});
  }
  return out;
}

Ranges intersect(const Ranges& a, const Ranges& b) {
  Ranges sorted;  // of b, if it does not ascend: what it shares with a range of a comes in order
  if (!std::is_sorted(b.begin(), b.end())) {
    sorted = b;
    std::sort(sorted.begin(), sorted.end());
  }
  const Ranges& others = sorted.empty() ? b : sorted;
  Ranges out;
  for (const Range x : a) {
    auto y = std::partition_point(others.begin(), others.end(),
                                  [&](Range other) { return other.end <= x.begin; });
    for (; y != others.end() && y->begin < x.end; ++y) append(out, intersect(x, *y));
  }
  return out;
}

std::optional<Index> place_of(const Ranges& ranges, Index i) {
  Index before = 0;
  for (const Range r : ranges) {
    if (r.contains(i)) return before + i - r.begin;
    before += r.size();
  }
  return std::nullopt;
}

Index size(const Runs& runs) {
  Index sum = 0;
  for (const Run& r : runs) sum += r.count;
  return sum;
}

Runs part(const Runs& runs, Range rows) {
  Runs out;
  Index before = 0;
  for (const Run& run : runs) {
    const Range local = intersect(Range{rows.begin - before, rows.end - before}, {0, run.count});
    if (!local.empty()) out.push_back(run.part(local));
    before += run.count;
  }
  return out;
}

}  // namespace dattn
