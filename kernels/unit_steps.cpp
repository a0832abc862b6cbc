#include "kernels/unit_steps.hpp"

#include <algorithm>

namespace dattn {
namespace {

/// A panel of lanes: rows of all of them, and of each part that has some.
struct Panel {
  std::span<const Index> row_of_lane;
  std::array<Range, 2> part_rows{};
  std::size_t parts = 0;
  Range bounds{};  ///< of what it sees

  std::span<const Range> rows() const { return {part_rows.data(), parts}; }
};

Range used_rows(std::span<const Index> row_of_lane) {
  std::size_t last = row_of_lane.size() - 1;
  while (row_of_lane[last] < 0) --last;
  return {row_of_lane.front(), row_of_lane[last] + 1};
}

std::vector<Panel> panels_of(const LiveRows& live, std::span<const Index> row_of_lane,
                             const Kernel& kernel) {
  const auto lanes = static_cast<std::size_t>(kernel.lanes);
  const std::size_t part = lanes / static_cast<std::size_t>(kernel.parts);
  std::vector<Panel> panels;
  for (std::size_t first = 0; first < row_of_lane.size(); first += lanes) {
    Panel panel{.row_of_lane = row_of_lane.subspan(first, lanes)};
    for (std::size_t at = 0; at < lanes && panel.row_of_lane[at] >= 0; at += part) {
      panel.part_rows[panel.parts++] = used_rows(panel.row_of_lane.subspan(at, part));
    }
    panel.bounds = live.bounds(used_rows(panel.row_of_lane));
    panels.push_back(panel);
  }
  return panels;
}

}  // namespace

UnitSteps::UnitSteps(const LiveRows& live, std::span<const Index> row_of_lane, const Kernel& kernel,
                     Index keys_of_tile, Range tiles, Index keys)
    : lanes_(static_cast<std::size_t>(kernel.lanes)) {
  if (live.none()) return;
  const std::vector<Panel> panels = panels_of(live, row_of_lane, kernel);
  const Range seen = live.bounds(live.rows());
  const Range whole = live.whole();
  const Index last = std::min(tiles.end, (seen.end + keys_of_tile - 1) / keys_of_tile);
  LaneMasks masks(kernel.lanes, static_cast<int>(keys_of_tile));
  std::vector<Piece> pieces;
  for (Index t = std::max(tiles.begin, seen.begin / keys_of_tile); t < last; ++t) {
    const Range tile{t * keys_of_tile, std::min(keys, (t + 1) * keys_of_tile)};
    if (whole.contains(tile)) {
      if (!runs_.empty() && runs_.back().count == 0 && runs_.back().tiles.end == t) {
        ++runs_.back().tiles.end;
      } else {
        runs_.push_back({{t, t + 1}, 0, 0});
      }
      continue;
    }
    // Rows of many spans leave whole stretches of tiles out.
    if (const Index next = live.next(tile.begin) / keys_of_tile; next > t) {
      t = next - 1;
      continue;
    }
    const std::size_t first = steps_.size();
    for (std::size_t p = 0; p < panels.size(); ++p) {
      if (intersect(panels[p].bounds, tile).empty()) continue;
      live.pieces(panels[p].rows(), tile, kernel.granule, pieces);
      if (pieces.empty()) continue;
      Held held{.panel = static_cast<Index>(p),
                .piece = pieces_.size(),
                .pieces = pieces.size(),
                .lane = bounds_.size(),
                .bits = bits_.size(),
                .masked = std::any_of(pieces.begin(), pieces.end(),
                                      [](const Piece& x) { return x.masked; }),
                .has_bits = false};
      pieces_.insert(pieces_.end(), pieces.begin(), pieces.end());
      if (held.masked) {
        const Lanes allowed = masks.spell(live, panels[p].row_of_lane, tile);
        bounds_.insert(bounds_.end(), allowed.begin, allowed.begin + lanes_);
        bounds_.insert(bounds_.end(), allowed.end, allowed.end + lanes_);
        held.has_bits = allowed.bits != nullptr;
        if (held.has_bits) bits_.insert(bits_.end(), allowed.bits, allowed.bits + tile.size());
      }
      steps_.push_back(held);
    }
    if (steps_.size() > first) runs_.push_back({{t, t + 1}, first, steps_.size() - first});
  }
}

UnitSteps::Step UnitSteps::step(std::size_t at) const {
  const Held& held = steps_[at];
  Lanes allowed{};
  if (held.masked) {
    allowed = {bounds_.data() + held.lane, bounds_.data() + held.lane + lanes_,
               held.has_bits ? bits_.data() + held.bits : nullptr};
  }
  return {held.panel, {pieces_.data() + held.piece, held.pieces}, allowed, held.masked};
}

Index UnitSteps::bytes() const {
  const auto of = [](const auto& items) {
    return static_cast<Index>(items.capacity() * sizeof(items.front()));
  };
  return static_cast<Index>(sizeof *this) + of(runs_) + of(steps_) + of(pieces_) + of(bounds_) +
         of(bits_);
}

}  // namespace dattn
