// What the panels of a unit are told to compute, against the mask itself.
#include "kernels/unit_steps.hpp"

#include <gtest/gtest.h>

#include "kernels/isa.hpp"

namespace dattn {
namespace {

struct Case {
  const char* mask;
  Index queries, keys;
  Index heads;  ///< of a group, side by side in the lanes
};

/// Lanes [first, first + count) of a group, and behind them none up to a whole panel.
std::vector<Index> rows_of_lanes(Index first, Index count, Index heads, Index lanes) {
  std::vector<Index> rows;
  for (Index i = 0; i < count; ++i) rows.push_back((first + i) / heads);
  while (std::ssize(rows) % lanes != 0) rows.push_back(-1);
  return rows;
}

/// What a step lets lane `lane` of its panel see of key `key` of a tile: 0 nothing, 1 it, or -1 if
/// two pieces do.
int seen(const UnitSteps::Step& step, const Kernel& kernel, Index tile, Index lane, Index key) {
  int found = 0;
  for (const Piece& piece : step.pieces) {
    if (key < piece.first || key >= piece.first + piece.count) continue;
    if ((piece.live >> (lane * kernel.parts / kernel.lanes) & 1u) == 0) continue;
    std::vector<unsigned> allowed(static_cast<std::size_t>(tile), 1u);
    if (piece.masked) mark_allowed(step.allowed, static_cast<std::size_t>(lane), allowed);
    if (allowed[static_cast<std::size_t>(key)] == 0) continue;
    found = found == 0 ? 1 : -1;
  }
  return found;
}

/// `tile`: keys of a tile.
void expect_steps_of(const Case& c, const Kernel& kernel, Index tile, Range lanes, Range tiles) {
  Shape shape{};
  shape.queries = c.queries;
  shape.keys = c.keys;
  shape.query_heads = c.heads;
  shape.key_heads = shape.value_heads = 1;
  shape.d_qk = shape.d_v = 8;
  const MaskPtr mask = parse_mask(c.mask, shape);
  const Where where{
      shape, {0, c.heads}, {0, 1}, {0, 1}, {{shape.first_query(), c.queries, 1}}, {{0, c.keys, 1}}};
  const Range rows{lanes.begin / c.heads, (lanes.end - 1) / c.heads + 1};
  const std::vector<Index> row_of = rows_of_lanes(lanes.begin, lanes.size(), c.heads, kernel.lanes);
  const UnitSteps steps(LiveRows(where, *mask, 0, rows), row_of, kernel, tile, tiles, c.keys);

  std::vector<int> found(row_of.size() * static_cast<std::size_t>(c.keys));
  Index before = tiles.begin;
  const auto add = [&](Index t, const UnitSteps::Step& step) {
    const Index first = t * tile;
    for (Index lane = 0; lane < kernel.lanes; ++lane) {
      const Index at = step.panel * kernel.lanes + lane;
      for (Index key = first; key < std::min(first + tile, c.keys); ++key) {
        found[static_cast<std::size_t>(at * c.keys + key)] +=
            seen(step, kernel, tile, lane, key - first);
      }
    }
  };
  for (const UnitSteps::Run& run : steps.runs()) {
    ASSERT_LE(before, run.tiles.begin);
    ASSERT_FALSE(run.tiles.empty());
    ASSERT_TRUE(run.count == 0 || run.tiles.size() == 1);
    before = run.tiles.end;
    for (Index t = run.tiles.begin; t < run.tiles.end; ++t) {
      const Piece all{0, static_cast<int>(std::min<Index>(tile, c.keys - t * tile)), false};
      for (Index p = 0; p < std::ssize(row_of) / kernel.lanes && run.count == 0; ++p) {
        add(t, {p, {&all, 1}, {}, false});
      }
    }
    for (std::size_t i = run.first; i < run.first + run.count; ++i) {
      add(run.tiles.begin, steps.step(i));
    }
  }
  ASSERT_LE(before, tiles.end);
  for (std::size_t lane = 0; lane < row_of.size(); ++lane) {
    for (Index key = 0; key < c.keys && row_of[lane] >= 0; ++key) {
      const bool in = key / tile >= tiles.begin && key / tile < tiles.end;
      const bool allowed = in && mask->allows(0, shape.first_query() + row_of[lane], key);
      ASSERT_EQ(found[lane * static_cast<std::size_t>(c.keys) + static_cast<std::size_t>(key)],
                allowed ? 1 : 0)
          << c.mask << " lane " << lane << " row " << row_of[lane] << " key " << key;
    }
  }
}

TEST(UnitSteps, SayWhatTheMaskSays) {
  const Case cases[] = {
      {"full", 300, 700, 1},
      {"causal", 700, 700, 1},
      {"causal", 131, 900, 3},
      {"window:150,0", 900, 900, 2},
      {"window:40,40", 900, 900, 1},
      {"documents:300,1,299,100", 700, 700, 1},
      {"documents:300,1,299,100+causal", 700, 700, 4},
      {"s2:block=16,local=2,stride=3", 700, 700, 1},
      {"stream:sink=10,recent=70", 800, 800, 2},
      {"dilated:100,100,3", 500, 500, 1},
  };
  for (const Isa* isa : available_isas()) {
    for (const Kernel* kernel : {isa->f4, isa->bf16}) {
      for (const Case& c : cases) {
        const Index lanes = c.queries * c.heads;
        for (const Index tile : {Index{kernel->tile}, Index{kernel->backward_tile}}) {
          const Index tiles = (c.keys + tile - 1) / tile;
          for (Index first = 0; first < lanes; first += 128) {
            const Range some{first, std::min<Index>(first + 128, lanes)};
            expect_steps_of(c, *kernel, tile, some, {0, tiles});
            if (HasFatalFailure()) return;
          }
          expect_steps_of(c, *kernel, tile, {lanes - 37, lanes}, {tiles / 2, tiles});
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(UnitSteps, RunsOfTilesThatAllSeeAreOne) {
  const Kernel& kernel = *available_isas().back()->f4;
  const Shape shape{.queries = 10000, .keys = 10000};
  const MaskPtr mask = parse_mask("causal", shape);
  const Where where{shape, {0, 1}, {0, 1}, {0, 1}, {{0, 10000, 1}}, {{0, 10000, 1}}};
  const UnitSteps steps(LiveRows(where, *mask, 0, {9872, 10000}),
                        rows_of_lanes(9872, 128, 1, kernel.lanes), kernel, kernel.tile,
                        {0, (10000 + kernel.tile - 1) / kernel.tile}, 10000);
  ASSERT_FALSE(steps.runs().empty());
  EXPECT_EQ(steps.runs().front().count, 0u);
  EXPECT_EQ(steps.runs().front().tiles, (Range{0, 9872 / kernel.tile}));
  EXPECT_LE(steps.runs().size(), 3u);
}

TEST(UnitSteps, NoneWhereNothingIsSeen) {
  const Kernel& kernel = *available_isas().front()->f4;
  const Shape shape{.queries = 4, .keys = 1000};
  const MaskPtr mask = parse_mask("window:10,0", shape);
  const Where where{shape, {0, 1}, {0, 1}, {0, 1}, {{996, 4, 1}}, {{0, 500, 1}}};
  const UnitSteps steps(LiveRows(where, *mask, 0, {0, 4}), rows_of_lanes(0, 4, 1, kernel.lanes),
                        kernel, kernel.tile, {0, (500 + kernel.tile - 1) / kernel.tile}, 500);
  EXPECT_TRUE(steps.runs().empty());
}

}  // namespace
}  // namespace dattn
