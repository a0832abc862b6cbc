#include "kernels/masks/neighbor.hpp"

#include <array>
#include <numeric>
#include <stdexcept>

#include "kernels/settings.hpp"
#include "kernels/tiled_grid.hpp"

namespace dattn {
namespace {

constexpr std::string_view kForm =
    "neighbor:dims=HxW,window=7,stride=1,dilation=1,causal=0,tile=HxW";
constexpr std::size_t kMostDims = TiledGrid::kMostDims;

/// One dimension of the grid.
struct Axis {
  Index length;
  Index window;
  Index stride;
  Index dilation;
  bool causal;

  /// The coordinates that coordinate x sees: begin, begin + dilation, ... below end.
  ///
  /// NATTEN's rule (Hassani et al. 2023 and 2025, arXiv 2204.07143 and 2504.16922): coordinates of
  /// one dilation group see each other only; within it a window is centred on the leader of x's
  /// stride and, at an edge, shifted inward; a causal one ends at x and shrinks.
  Range seen(Index x) const {
    const Index group = x % dilation;
    const Index i = x / dilation;
    const Index count = length / dilation + (group < length % dilation ? 1 : 0);
    const Index first = i / stride * stride;
    Range range{};
    if (causal) {
      const Index leader = std::min(first + stride - 1, count - 1);
      range = {std::max<Index>(leader - window + 1, 0), i + 1};
    } else {
      const Index leader = std::min(first + stride / 2, count - 1);
      const Index begin = std::clamp<Index>(leader - window / 2, 0, count - window);
      range = {begin, begin + window};
    }
    return {group + dilation * range.begin, group + dilation * (range.end - 1) + 1};
  }
  bool sees(Index x, Index y) const { return (y - x) % dilation == 0 && seen(x).contains(y); }
};

/// A query sees the keys that it sees along every axis.
class Neighbor final : public Mask {
 public:
  /// `axes` are those that there are.
  Neighbor(TiledGrid grid, const std::vector<Axis>& axes)
      : grid_(std::move(grid)), first_(kMostDims - axes.size()) {
    axes_.fill({.length = 1, .window = 1, .stride = 1, .dilation = 1, .causal = false});
    std::copy(axes.begin(), axes.end(), axes_.begin() + static_cast<std::ptrdiff_t>(first_));
    for (std::size_t d = 0; d < kMostDims; ++d) {
      for (Index x = 0; x < axes_[d].length; ++x) seen_[d].push_back(axes_[d].seen(x));
      same_[d].assign(seen_[d].size(), 1);
      for (std::size_t x = seen_[d].size() - 1; x-- > 0;) {
        if (seen_[d][x] == seen_[d][x + 1]) same_[d][x] = same_[d][x + 1] + 1;
      }
    }
  }

  bool allows(Index, Index query, Index key) const override {
    if (query < 0 || query >= grid_.size() || key < 0 || key >= grid_.size()) return false;
    const Point q = grid_.point(query);
    const Point k = grid_.point(key);
    for (std::size_t d = 0; d < kMostDims; ++d) {
      if (!axes_[d].sees(q[d], k[d])) return false;
    }
    return true;
  }
  void spans(Index, Index query, Range keys, std::vector<Range>& out) const override {
    if (query < 0 || query >= grid_.size()) return;
    const Point q = grid_.point(query);
    const Range inside = intersect(keys, {0, grid_.size()});
    if (inside.empty()) return;
    Box within;
    const bool everything = inside == Range{0, grid_.size()};
    if (!everything) within = grid_.box(inside);
    for (std::size_t d = 0; d < kMostDims; ++d) {
      const Range among = everything ? Range{0, axes_[d].length} : within[d];
      const Index step = axes_[d].dilation;
      within[d] = seen(d, q[d]);
      if (within[d].begin < among.begin) {
        within[d].begin += (among.begin - within[d].begin + step - 1) / step * step;
      }
      within[d].end = std::min(within[d].end, among.end);
    }
    // Behind those of others, and joined in place: this is called row by row.
    const std::size_t first = out.size();
    for (Index x = within[0].begin; x < within[0].end; x += axes_[0].dilation) {
      for (Index y = within[1].begin; y < within[1].end; y += axes_[1].dilation) {
        row({x, y, 0}, within[2], keys, out);
      }
    }
    const auto found = out.begin() + static_cast<std::ptrdiff_t>(first);
    if (!std::is_sorted(found, out.end())) std::sort(found, out.end());
    std::size_t end = first;
    for (std::size_t i = first; i < out.size(); ++i) {
      if (end > first && out[end - 1].end == out[i].begin) {
        out[end - 1].end = out[i].end;
      } else {
        out[end++] = out[i];
      }
    }
    out.resize(end);
  }
  /// Of one residue of the last axis's dilation a row of the grid is one span.
  void members(Index head, Index query, const Run& keys, std::vector<Range>& out) const override {
    const Index step = axes_.back().dilation;
    if (step == 1 || keys.step % step != 0 || !grid_.row_by_row()) {
      return Mask::members(head, query, keys, out);
    }
    if (query < 0 || query >= grid_.size()) return;
    const Point q = grid_.point(query);
    const std::size_t first = out.size();
    const Range across = seen(2, q[2]);
    for (Index x = seen(0, q[0]).begin; x < seen(0, q[0]).end; x += axes_[0].dilation) {
      for (Index y = seen(1, q[1]).begin; y < seen(1, q[1]).end; y += axes_[1].dilation) {
        const Index begin = grid_.position({x, y, across.begin});
        if ((begin - keys.first) % step != 0) continue;
        append(out, first, keys.inside({begin, begin + across.size()}));
      }
    }
  }
  /// Box by box, axis by axis.
  Cover cover(Index, Range queries, Range keys) const override {
    const Range all{0, grid_.size()};
    const Boxes q = grid_.boxes(intersect(queries, all));
    const Boxes k = grid_.boxes(intersect(keys, all));
    bool some = false;
    bool gap = !all.contains(queries) || !all.contains(keys);
    for (const Box& of_q : q) {
      for (const Box& of_k : k) {
        bool any = true;
        bool whole = true;
        for (std::size_t d = 0; d < kMostDims && any; ++d) {
          any = sees_some(d, of_q[d], of_k[d]);
          whole = whole && sees_all(d, of_q[d], of_k[d]);
        }
        some = some || any;
        gap = gap || !any || !whole;
        if (some && gap) return Cover::Some;
      }
    }
    return some ? Cover::All : Cover::None;
  }
  /// Of boxes it is the product over the axes.
  std::optional<Index> pairs(Index, Range queries, Range keys) const override {
    const Range all{0, grid_.size()};
    const Boxes k = grid_.boxes(intersect(keys, all));
    Index sum = 0;
    for (const Box& of_q : grid_.boxes(intersect(queries, all))) {
      for (const Box& of_k : k) {
        Index product = 1;
        for (std::size_t d = 0; d < kMostDims && product > 0; ++d) {
          Index along = 0;
          for (Index x = of_q[d].begin; x < of_q[d].end; ++x) along += seen_of(d, x, of_k[d]);
          product *= along;
        }
        sum += product;
      }
    }
    return sum;
  }
  /// Within a tile, row by row as far as whole rows see the same.
  Index alike(Index, Index query, Range) const override {
    if (query < 0) return -query;
    if (query >= grid_.size()) return kAllAlike;
    const Point q = grid_.point(query);
    Index count = 1;
    Index layer = 1;  // tokens of the tile along the axes done
    for (std::size_t d = kMostDims; d-- > 0;) {
      const Range own = grid_.tile_of(d, q[d]);
      const Index same = std::min(same_[d][static_cast<std::size_t>(q[d])], own.end - q[d]);
      count += (same - 1) * layer;
      const bool whole = same_[d][static_cast<std::size_t>(own.begin)] >= own.size();
      if (q[d] + same < own.end || !whole) break;
      layer *= own.size();
    }
    return count;
  }
  /// Where tokens are numbered row by row.
  Index step(Index) const override {
    if (!grid_.row_by_row()) return 1;
    Index step = 0;
    Index behind = 1;  // tokens of one coordinate
    for (std::size_t d = kMostDims; d-- > 0;) {
      if (axes_[d].window > 1) step = std::gcd(step, axes_[d].dilation * behind);
      behind *= axes_[d].length;
    }
    return std::max<Index>(step, 1);
  }
  std::string spec() const override {
    const auto each = [&](auto member) {
      std::vector<Index> values;
      for (std::size_t d = first_; d < kMostDims; ++d) {
        values.push_back(static_cast<Index>(axes_[d].*member));
      }
      return joined(values);
    };
    std::vector<Index> tiles;
    for (std::size_t d = first_; d < kMostDims; ++d) tiles.push_back(grid_.tile(d));
    return "neighbor:dims=" + each(&Axis::length) + ",window=" + each(&Axis::window) +
           ",stride=" + each(&Axis::stride) + ",dilation=" + each(&Axis::dilation) +
           ",causal=" + each(&Axis::causal) + ",tile=" + joined(tiles);
  }

 private:
  using Point = TiledGrid::Point;
  using Box = TiledGrid::Box;
  using Boxes = TiledGrid::Boxes;

  Range seen(std::size_t d, Index x) const { return seen_[d][static_cast<std::size_t>(x)]; }

  /// How many of these coordinates x sees.
  Index seen_of(std::size_t d, Index x, Range keys) const {
    const Index step = axes_[d].dilation;
    const Range own = seen(d, x);
    const Index before = (std::max<Index>(0, keys.begin - own.begin) + step - 1) / step;
    const Index behind = (std::min(own.end, keys.end) - own.begin + step - 1) / step;
    return std::max<Index>(0, behind - before);
  }
  /// Whether one of these coordinates sees one of those. Windows move on with their queries and
  /// leave nothing out between them, if they are of one dilation group.
  bool sees_some(std::size_t d, Range queries, Range keys) const {
    if (axes_[d].dilation == 1) {
      const Range near{seen(d, queries.begin).begin, seen(d, queries.end - 1).end};
      return !intersect(near, keys).empty();
    }
    for (Index x = queries.begin; x < queries.end; ++x) {
      if (seen_of(d, x, keys) > 0) return true;
    }
    return false;
  }
  /// Whether all of them see all of those.
  bool sees_all(std::size_t d, Range queries, Range keys) const {
    if (axes_[d].dilation > 1) {
      return queries.size() == 1 && keys.size() == 1 && axes_[d].sees(queries.begin, keys.begin);
    }
    return seen(d, queries.end - 1).begin <= keys.begin && keys.end <= seen(d, queries.begin).end;
  }

  /// The coordinates `seen` of the last axis, as ranges of positions inside `keys`.
  void row(Point at, Range seen, Range keys, std::vector<Range>& found) const {
    const Axis& axis = axes_.back();
    for (Index x = seen.begin; x < seen.end;) {
      const Index edge = grid_.tile_of(kMostDims - 1, x).end;
      const Index end = axis.dilation == 1 ? std::min(edge, seen.end) : x + 1;
      at.back() = x;
      const Index first = grid_.position(at);
      const Range part = intersect(keys, {first, first + end - x});
      if (!part.empty()) found.push_back(part);
      x += axis.dilation == 1 ? end - x : axis.dilation;
    }
  }

  TiledGrid grid_;
  std::array<Axis, kMostDims> axes_;  ///< those that there are not, in front, have length 1
  std::size_t first_;                 ///< the first of the others
  std::array<std::vector<Range>, kMostDims> seen_;
  std::array<std::vector<Index>, kMostDims> same_;  ///< coordinates from each on that see the same
};

[[noreturn]] void fail(const std::string& why) {
  throw std::invalid_argument(why + "; the mask is written " + std::string(kForm));
}

MaskPtr make(std::string_view arguments, const Shape& shape, const OpenNumbers&) {
  Settings settings(arguments, kForm);
  const std::vector<Index> dims = settings.counts("dims", 1);
  if (dims.empty() || dims.size() > kMostDims) fail("dims takes one to three lengths");
  Index size = 1;
  for (const Index n : dims) size = n > shape.keys / size ? shape.keys + 1 : size * n;
  if (size != shape.keys) {
    fail("dims=" + joined(dims) + " is " +
         (size > shape.keys ? "more than " : std::to_string(size) + " tokens, not ") +
         std::to_string(shape.keys) + " keys");
  }
  const auto each = [&](std::string_view name, std::vector<Index> otherwise, Index least) {
    std::vector<Index> values = settings.counts(name, least);
    if (values.empty()) values = std::move(otherwise);
    if (values.size() == 1) values.resize(dims.size(), values[0]);
    if (values.size() != dims.size()) {
      fail(std::string(name) + " takes one number or " + std::to_string(dims.size()));
    }
    return values;
  };
  const std::vector<Index> window = each("window", {7}, 1);
  const std::vector<Index> stride = each("stride", {1}, 1);
  const std::vector<Index> dilation = each("dilation", {1}, 1);
  const std::vector<Index> causal = each("causal", {0}, 0);
  const std::vector<Index> tile = each("tile", dims, 1);
  settings.done();
  std::vector<Axis> axes;
  for (std::size_t d = 0; d < dims.size(); ++d) {
    if (window[d] > dims[d] / dilation[d]) {
      fail("window " + std::to_string(window[d]) + " times dilation " +
           std::to_string(dilation[d]) + " is more than length " + std::to_string(dims[d]));
    }
    if (stride[d] > window[d]) {
      fail("stride " + std::to_string(stride[d]) + " is more than window " +
           std::to_string(window[d]));
    }
    if (causal[d] > 1) fail("causal is 0 or 1");
    axes.push_back({dims[d], window[d], stride[d], dilation[d], causal[d] == 1});
  }
  return std::make_shared<Neighbor>(TiledGrid(dims, tile), axes);
}

}  // namespace

MaskKind neighbor_kind() {
  return {"neighbor", kForm,
          "a query sees its neighbourhood on a grid; windows shift inward at the edges",
          "one to three dims that multiply to the keys, and of the rest one number or one a dim; "
          "dilation * window <= length; stride <= window",
          make};
}

}  // namespace dattn
