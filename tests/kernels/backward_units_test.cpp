// How backward counts what each tile of keys is seen by, and cuts its work by it.
#include "kernels/backward_units.hpp"

#include <gtest/gtest.h>

#include "kernels/area.hpp"

namespace dattn {
namespace {

struct Case {
  Shape shape;
  const char* mask;
  Runs queries;
  Runs keys;
};

const std::vector<Case> kCases{
    {{700, 700, 1, 1, 1, 8, 8}, "causal", {{0, 700, 1}}, {{0, 700, 1}}},
    {{700, 700, 2, 2, 2, 8, 8}, "full@0;window:90,3@1", {{0, 700, 1}}, {{0, 700, 1}}},
    {{700, 700, 1, 1, 1, 8, 8}, "stream:sink=5,recent=64", {{130, 300, 1}}, {{0, 700, 1}}},
    {{700, 700, 1, 1, 1, 8, 8}, "window:40,0", {{3, 100, 4}, {500, 100, 2}}, {{1, 200, 3}}},
    {{1280, 1280, 2, 2, 2, 8, 8}, "s2:block=16,local=2,stride=8", {{0, 1280, 1}}, {{0, 1280, 1}}},
    {{780, 780, 1, 1, 1, 8, 8}, "neighbor:dims=26x30,window=7", {{0, 780, 1}}, {{0, 780, 1}}},
    {{700, 700, 1, 1, 1, 8, 8},
     "causal+documents:96,4,200,400",
     {{0, 700, 1}},
     {{0, 300, 1}, {500, 200, 1}}},
};

void expect_units(const Case& c, int threads) {
  SCOPED_TRACE(c.mask);
  const MaskPtr mask = parse_mask(c.mask, c.shape);
  const Where where{c.shape,
                    {0, c.shape.query_heads},
                    {0, c.shape.key_heads},
                    {0, c.shape.value_heads},
                    c.queries,
                    c.keys};
  const Kernel& kernel = *chosen_isa().f4;
  const Work work{.threads = threads};
  BackwardBlock<float> block{
      .q = {nullptr, size(c.queries), c.shape.query_heads, c.shape.d_qk},
      .k = {nullptr, size(c.keys), c.shape.key_heads, c.shape.d_qk},
      .v = {nullptr, size(c.keys), c.shape.value_heads, c.shape.d_v},
      .d_o = {},
      .lse = {},
      .delta = {},
      .dq = {},
      .dk = {},
      .dv = {},
      .where = where,
      .mask = *mask,
      .kernel = kernel,
      .normalizer = Normalizer::softmax,
      .scale = 1,
      .groups = head_groups(where, *mask),
      .tiles = (size(c.keys) + kernel.backward_tile - 1) / kernel.backward_tile,
      .taken = {},
      .taken_by = {},
      .seen = {}};
  const std::vector<Cluster> clusters = clusters_of(block.groups);
  take_keys(block, clusters, work.score);
  look_at_tiles(block, work);
  double all = 0;
  for (Index g = 0; g < std::ssize(block.groups); ++g) {
    const TakenKeys& keys = block.keys_of(g);
    ASSERT_EQ(std::ssize(block.seen_by(g)), block.tiles);
    for (Index t = 0; t < block.tiles; ++t) {
      const SeenTile& seen = block.seen_by(g)[static_cast<std::size_t>(t)];
      const Runs tile = part(keys.where.keys, block.tile(t));
      const Index pairs = area(*mask, block.head(g), c.queries, tile);
      EXPECT_EQ(seen.pairs, pairs) << "tile " << t;
      EXPECT_EQ(area(*mask, block.head(g), part(c.queries, seen.rows), tile), pairs)
          << "tile " << t << ": rows " << seen.rows.begin << ' ' << seen.rows.end;
      all += static_cast<double>(pairs);
    }
  }
  const std::vector<Unit> units = units_of(block, clusters, 3);
  for (const Unit& unit : units) all -= unit.area;
  EXPECT_EQ(all, 0);
}

TEST(BackwardUnits, CountWhatTheMaskAllows) {
  for (const Case& c : kCases) {
    expect_units(c, 1);
    expect_units(c, 3);
  }
}

}  // namespace
}  // namespace dattn
