#include "kernels/patches.hpp"

#include <algorithm>

namespace dattn {
namespace {

constexpr std::size_t kLeastSpans = 3;  // of a row on a grid
constexpr Index kPackCost = 12;         // what a packed key takes, in pairs of a head
constexpr double kLeastGain = 1.2;      // of computing and packing

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

/// What a lane costs in pairs of a head where queries lie in the order of their positions.
double cost_lying(const Line& line, Index query, Index rows_of_part, Index heads,
                  const Kernel& kernel) {
  Granules granules(kernel.granule);
  std::vector<Range> spans;
  const Index first = query / rows_of_part * rows_of_part;
  for (Index i = 0; i < rows_of_part; ++i) {
    line.spans(first + i, spans);
    for (const Range span : spans) granules.add(span);
  }
  return static_cast<double>(granules.keys()) +
         static_cast<double>(kPackCost) / static_cast<double>(heads);
}

/// The same in patches; `deep` are the rows (planes) that the block's queries have, at most.
double cost_in(const Patches& p, const Line& line, Index query, Index rows_of_part, Index heads,
               Index deep, const Kernel& kernel) {
  const Index across = p.width * p.height;
  const Index behind = p.plane != 0 ? p.plane : p.row;  // from one to the next of a strip's depth
  const Index x = query % p.row / p.width * p.width;
  const Index y = p.plane != 0 ? query % p.plane / p.row / p.height * p.height : 0;
  const Index of_unit = std::clamp<Index>(kPatchLanes / heads / across, 1, deep);
  const Index of_part = std::min(of_unit, std::max<Index>(1, rows_of_part / across));
  const Index first = std::max<Index>(0, query / behind - of_unit / 2) * behind + y * p.row + x;
  Places places;
  std::vector<Range> spans;
  const auto each_row = [&](Index count, const auto& f) {
    for (Index d = 0; d < count; ++d) {
      for (Index i = 0; i < p.height; ++i) {
        for (Index j = 0; j < p.width; ++j) {
          line.spans(first + d * behind + i * p.row + j, spans);
          f();
        }
      }
    }
  };
  each_row(of_unit, [&] { places.add(spans); });
  places.number();
  // A part in the middle of the unit would be the same.
  Granules granules(kernel.granule);
  each_row(of_part, [&] { places.each(spans, [&](Range seen) { granules.add(seen); }); });
  const double lanes = static_cast<double>(of_part * across) / static_cast<double>(rows_of_part);
  return static_cast<double>(granules.keys()) / std::min(1.0, lanes) +
         static_cast<double>(kPackCost * places.size()) /
             static_cast<double>(of_unit * across * heads);
}

}  // namespace

void Places::clear() {
  keys_.clear();
  near_ = 0;
}

void Places::add(std::span<const Range> spans) {
  if (spans.empty()) return;
  // Rows come in the order of their positions, nearly always behind or among what there is.
  auto at = keys_.begin() + static_cast<std::ptrdiff_t>(std::min(near_, keys_.size()));
  if (at == keys_.end() || at->begin > spans[0].begin) {
    at = std::upper_bound(keys_.begin(), keys_.end(), spans[0].begin,
                          [](Index x, const Range& r) { return x <= r.end; });
  }
  bool first = true;
  for (const Range span : spans) {
    while (at != keys_.end() && at->end < span.begin) ++at;
    if (first) near_ = static_cast<std::size_t>(at - keys_.begin());
    first = false;
    if (at == keys_.end() || at->begin > span.end) {
      at = keys_.insert(at, span);
      continue;
    }
    at->begin = std::min(at->begin, span.begin);
    if (span.end <= at->end) continue;
    at->end = span.end;
    auto next = at + 1;
    while (next != keys_.end() && next->begin <= at->end)
      at->end = std::max(at->end, (next++)->end);
    at = keys_.erase(at + 1, next) - 1;
  }
}

void Places::number() {
  place_.clear();
  size_ = 0;
  near_ = 0;
  for (const Range range : keys_) {
    place_.push_back(size_);
    size_ += range.size();
  }
}

Index Patches::strip(Index position) const {
  const Index at = floored(position, step);
  const Index x = modulo(at, row) / width;
  const Index y = plane != 0 ? modulo(at, plane) / row / height : 0;
  return y * ((row + width - 1) / width) + x;
}

Index Patches::strips() const {
  const Index rows = plane != 0 ? plane / row : 1;
  return (row + width - 1) / width * ((rows + height - 1) / height);
}

std::optional<Patches> patches_of(const Where& where, const Mask& mask, Index head, Index heads,
                                  const Kernel& kernel) {
  const Index rows = size(where.queries);
  const auto keys = line_of(where);
  if (!keys || heads > kPatchLanes || rows * heads <= kPatchLanes) return {};
  const Line line{mask, head, *keys};
  const Index middle =
      floored(part(where.queries, {rows / 2, rows / 2 + 1}).front().first, keys->step);
  if (middle < 0) return {};
  std::vector<Range> spans;
  line.spans(middle, spans);
  const std::optional<Patches> grid = grid_of(spans);
  if (!grid) return {};
  const Index rows_of_part = std::max<Index>(1, kernel.lanes / kernel.parts / heads);
  const Index deep =
      (rows + std::max(grid->row, grid->plane) - 1) / std::max(grid->row, grid->plane);
  std::optional<Patches> best;
  double least = cost_lying(line, middle, rows_of_part, heads, kernel) / kLeastGain;
  for (Index width = 1; width <= std::min(rows_of_part, grid->row); width *= 2) {
    const Index most =
        grid->plane == 0 ? 1 : std::min(rows_of_part / width, grid->plane / grid->row);
    for (Index height = 1; height <= most; height *= 2) {
      Patches patches = *grid;
      patches.step = keys->step;
      patches.width = width;
      patches.height = height;
      const double cost = cost_in(patches, line, middle, rows_of_part, heads, deep, kernel);
      if (cost >= least) continue;
      least = cost;
      best = patches;
    }
  }
  return best;
}

}  // namespace dattn
