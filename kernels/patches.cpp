#include "kernels/patches.hpp"

#include <algorithm>

namespace dattn {
namespace {

constexpr std::size_t kLeastSpans = 3;  // of a row on a grid
constexpr Index kStepCost = 10;         // what a step of a panel takes beside its pairs, in keys
constexpr double kLeastGain = 1.2;      // of computing

Index floored(Index a, Index b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
Index modulo(Index a, Index b) { return a - floored(a, b) * b; }

/// Positions are counted in steps of the block, all of one residue.
struct Line {
  const Mask& mask;
  Index head;
  Run keys;  ///< all that there are

  void spans(Index query, std::vector<Range>& out) const {
    out.clear();
    if (keys.step == 1) {
      mask.spans(head, query, keys.bounds(), out);
    } else {
      mask.members(head, query * keys.step + keys.first, keys, out);
    }
  }
};

/// The step of all rows of the block; nothing where there is none, or where runs are many.
std::optional<Run> line_of(const Where& where) {
  constexpr std::size_t kMostRuns = 8;
  Index step = 0;
  for (const Runs* runs : {&where.queries, &where.keys}) {
    if (runs->empty() || runs->size() > kMostRuns) return {};
    for (const Run& run : *runs) {
      if (step != 0 && run.step != step) return {};
      step = run.step;
    }
  }
  const Index first = modulo(where.keys.front().first, step);
  for (const Runs* runs : {&where.queries, &where.keys}) {
    for (const Run& run : *runs) {
      if (modulo(run.first, step) != first) return {};
    }
  }
  return Run{first, (where.shape.keys - first + step - 1) / step, step};
}

/// Rows of a grid, from the spans of one query: ranges of one length, as far apart each as the
/// next, and perhaps so again plane by plane.
std::optional<Patches> grid_of(const std::vector<Range>& spans) {
  if (spans.size() < kLeastSpans) return {};
  const auto begin = [&](std::size_t i) { return spans[i].begin - spans[0].begin; };
  const Index row = begin(1);
  std::size_t rows = 1;  // of a plane
  while (rows < spans.size() && begin(rows) == static_cast<Index>(rows) * row) ++rows;
  const Index plane = rows < spans.size() ? begin(rows) : 0;
  if (plane % row != 0 || spans.size() % rows != 0) return {};
  for (std::size_t i = 0; i < spans.size(); ++i) {
    const Index expected =
        static_cast<Index>(i / rows) * plane + static_cast<Index>(i % rows) * row;
    if (begin(i) != expected || spans[i].size() != spans[0].size()) return {};
  }
  return Patches{.row = row, .plane = plane};
}

/// Keys in whole granules that hold some of `places`.
class Granules {
 public:
  explicit Granules(Index granule) : granule_(granule) {}
  /// Ranges may come in any order.
  void add(Range places) {
    touched_.push_back({places.begin / granule_, (places.end - 1) / granule_ + 1});
  }
  Index keys() const { return dattn::size(union_of(touched_)) * granule_; }

 private:
  Index granule_;
  std::vector<Range> touched_;
};

/// What a part of a panel computes, in keys, where queries lie in the order of their positions.
Index cost_lying(const Line& line, Index query, Index rows_of_part, const Kernel& kernel) {
  Granules granules(kernel.granule);
  std::vector<Range> spans;
  const Index first = query / rows_of_part * rows_of_part;
  for (Index i = 0; i < rows_of_part; ++i) {
    line.spans(first + i, spans);
    for (const Range span : spans) granules.add(span);
  }
  return granules.keys();
}

/// The same in patches; finds where strips of keys begin.
Index cost_in(Patches& p, const Line& line, Index query, Index rows_of_part, const Kernel& kernel) {
  const Index across = p.width * p.height;
  const Index behind = p.plane != 0 ? p.plane : p.row;  // from one to the next of a strip's depth
  const Index deep = std::max<Index>(1, rows_of_part / across);
  const Index y = p.plane != 0 ? query % p.plane / p.row / p.height * p.height : 0;
  const Index first = query / behind * behind + y * p.row + query % p.row / p.width * p.width;
  std::vector<Range> seen;
  std::vector<Range> spans;
  for (Index d = 0; d < deep; ++d) {
    for (Index i = 0; i < across; ++i) {
      line.spans(first + d * behind + i / p.width * p.row + i % p.width, spans);
      seen.insert(seen.end(), spans.begin(), spans.end());
    }
  }
  const Ranges all = union_of(std::move(seen));
  Index left = p.row;
  Index top = behind;
  for (const Range span : all) {
    left = std::min(left, span.begin % p.row);
    top = std::min(top, span.begin % behind / p.row);
  }
  p.earlier = modulo(-left, p.width);
  p.above = modulo(-top, p.height);
  // Strips as long as the grid is deep.
  const Index length = (line.keys.count / behind + 1) * across / kernel.granule * kernel.granule;
  Granules granules(kernel.granule);
  std::vector<Index> strips;
  for (const Range span : all) {
    for (Index k = span.begin; k < span.end; ++k) {
      const Index right = (k % p.row + p.earlier) % p.width;
      const Index down = (k % behind / p.row + p.above) % p.height;
      const Index place = (k / behind * p.height + down) * p.width + right;
      strips.push_back(p.key_strip(k * p.step));
      granules.add({strips.back() * length + place, strips.back() * length + place + 1});
    }
  }
  std::sort(strips.begin(), strips.end());
  const Index steps = std::unique(strips.begin(), strips.end()) - strips.begin();
  return granules.keys() * rows_of_part / std::min(rows_of_part, deep * across) + steps * kStepCost;
}

template <class F>
StripOrder order_of(const Runs& runs, const Patches& patches, const F& strip_of) {
  StripOrder order;
  order.ends.assign(static_cast<std::size_t>(patches.strips()) + 1, 0);
  const auto each = [&](const auto& f) {
    for (const Run& run : runs) {
      for (Index i = 0; i < run.count; ++i) f(static_cast<std::size_t>(strip_of(run.at(i))));
    }
  };
  each([&](std::size_t strip) { ++order.ends[strip + 1]; });
  for (std::size_t i = 1; i < order.ends.size(); ++i) order.ends[i] += order.ends[i - 1];
  order.rows.resize(static_cast<std::size_t>(order.ends.back()));
  Index row = 0;
  each([&](std::size_t strip) {
    order.rows[static_cast<std::size_t>(order.ends[strip]++)] = row++;
  });
  return order;
}

}  // namespace

Index Patches::strip(Index position, Index right, Index down) const {
  const Index at = floored(position, step);
  const Index x = (modulo(at, row) + right) / width;
  const Index y = plane != 0 ? (modulo(at, plane) / row + down) / height : 0;
  return y * (row / width + 2) + x;
}

Index Patches::strips() const {
  const Index rows = plane != 0 ? plane / row : 1;
  return (row / width + 2) * (rows / height + 2);
}

StripOrder order_of_queries(const Runs& queries, const Patches& patches) {
  return order_of(queries, patches, [&](Index at) { return patches.query_strip(at); });
}

StripOrder order_of_keys(const Runs& keys, const Patches& patches) {
  return order_of(keys, patches, [&](Index at) { return patches.key_strip(at); });
}

std::optional<Patches> patches_of(const Where& where, const Mask& mask, Index head, Index heads,
                                  const Kernel& kernel) {
  const Index rows = size(where.queries);
  const auto keys = line_of(where);
  if (!keys || heads > kPatchLanes || rows * heads <= kPatchLanes) return {};
  const Line line{mask, head, *keys};
  Index query = floored(part(where.queries, {rows / 2, rows / 2 + 1}).front().first, keys->step);
  std::vector<Range> spans;
  std::optional<Patches> grid;
  for (int i = 0; i < 2; ++i) {
    if (query < 0) return {};
    line.spans(query, spans);
    grid = grid_of(spans);
    if (!grid) return {};
    // Once more in the middle of the rows (and planes): windows are shifted at their ends.
    if (grid->plane != 0) query = query / grid->plane * grid->plane + grid->plane / 2;
    query = query / grid->row * grid->row + grid->row / 2;
  }
  const Index rows_of_part = std::max<Index>(1, kernel.lanes / kernel.parts / heads);
  std::optional<Patches> best;
  double least = static_cast<double>(cost_lying(line, query, rows_of_part, kernel)) / kLeastGain;
  for (Index width = 1; width <= std::min(rows_of_part, grid->row); width *= 2) {
    const Index most =
        grid->plane == 0 ? 1 : std::min(rows_of_part / width, grid->plane / grid->row);
    for (Index height = 1; height <= most; height *= 2) {
      Patches patches = *grid;
      patches.step = keys->step;
      patches.width = width;
      patches.height = height;
      const auto cost = static_cast<double>(cost_in(patches, line, query, rows_of_part, kernel));
      if (cost >= least) continue;
      least = cost;
      best = patches;
    }
  }
  return best;
}

}  // namespace dattn
