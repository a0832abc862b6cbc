// spans and cover of every mask are held to its `allows`, and `allows` to the definition of
// mask_cases.
#include "kernels/mask.hpp"

#include <gmock/gmock.h>

#include <algorithm>

#include "kernels/masks/blocks.hpp"
#include "tests/block_files.hpp"
#include "tests/kernels/mask_cases.hpp"
namespace dattn {
namespace {

/// As many queries as keys, fewer, and more: query positions are then negative.
class EveryMask : public testing::TestWithParam<std::size_t> {
 protected:
  void for_each_shape(const std::function<void(const Shape&, const Mask&)>& check) const {
    const Index keys = mask_cases()[GetParam()].keys;
    const Index only = mask_cases()[GetParam()].queries;
    const std::vector<Index> all =
        only > 0 ? std::vector<Index>{only} : std::vector<Index>{keys, 4, keys + 6};
    for (const Index queries : all) {
      const Shape shape{.queries = queries,
                        .keys = keys,
                        .query_heads = kHeads,
                        .key_heads = kHeads,
                        .value_heads = kHeads};
      check(shape, *parse_mask(spec(), shape, open_blocks));
    }
  }
  const std::string& spec() const { return mask_cases()[GetParam()].spec; }
  const Allowed& allowed() const { return mask_cases()[GetParam()].allowed; }
};

TEST_P(EveryMask, AllowsWhatItsDefinitionAllows) {
  for_each_shape([&](const Shape& shape, const Mask& mask) {
    for (Index h = 0; h < kHeads; ++h) {
      for (Index q = shape.first_query(); q < shape.keys; ++q) {
        for (Index k = 0; k < shape.keys; ++k) {
          ASSERT_EQ(mask.allows(h, q, k), allowed()(h, q, k)) << h << ' ' << q << ' ' << k;
        }
      }
    }
  });
}

TEST_P(EveryMask, SpansAreTheAllowedKeysOfARow) {
  for_each_shape([&](const Shape& shape, const Mask& mask) {
    for (Index h = 0; h < kHeads; ++h) {
      for (Index q = shape.first_query() - 2; q < shape.keys + 2; ++q) {
        for (Index begin = 0; begin <= shape.keys; ++begin) {
          for (Index end = begin; end <= shape.keys + 2; ++end) {
            std::vector<Range> expected;
            for (Index k = begin; k < end; ++k) {
              if (!mask.allows(h, q, k)) continue;
              if (expected.empty() || expected.back().end != k) expected.push_back({k, k});
              ++expected.back().end;
            }
            // Behind what is there already, and never joined to it.
            std::vector<Range> spans{{0, begin}};
            mask.spans(h, q, {begin, end}, spans);
            expected.insert(expected.begin(), {0, begin});
            ASSERT_EQ(spans, expected) << h << ' ' << q << " in " << begin << ' ' << end;
          }
        }
      }
    }
  });
}

TEST_P(EveryMask, CoverAndPairsAreExactForEveryTile) {
  for_each_shape([&](const Shape& shape, const Mask& mask) {
    for (Index h = 0; h < kHeads; ++h) {
      for (Index q0 = shape.first_query() - 2; q0 <= shape.keys + 2; ++q0) {
        for (Index k0 = 0; k0 <= shape.keys + 2; ++k0) {
          // Grown row by row: `sums` holds the allowed pairs of [q0, q1) x [k0, k).
          std::vector<Index> sums(static_cast<std::size_t>(shape.keys + 3 - k0), 0);
          for (Index q1 = q0; q1 <= shape.keys + 2; ++q1) {
            for (Index k1 = k0; k1 <= shape.keys + 2; ++k1) {
              const Index pairs = sums[static_cast<std::size_t>(k1 - k0)];
              const Cover expected = pairs == 0                       ? Cover::None
                                     : pairs == (q1 - q0) * (k1 - k0) ? Cover::All
                                                                      : Cover::Some;
              ASSERT_EQ(mask.cover(h, {q0, q1}, {k0, k1}), expected)
                  << h << " queries " << q0 << ' ' << q1 << " keys " << k0 << ' ' << k1;
              ASSERT_EQ(mask.pairs(h, {q0, q1}, {k0, k1}).value_or(pairs), pairs)
                  << h << " queries " << q0 << ' ' << q1 << " keys " << k0 << ' ' << k1;
            }
            Index row = 0;
            for (Index k = k0; k < shape.keys + 2; ++k) {
              row += mask.allows(h, q1, k) ? 1 : 0;
              sums[static_cast<std::size_t>(k + 1 - k0)] += row;
            }
          }
        }
      }
    }
  });
}

TEST_P(EveryMask, AlikeQueriesSeeTheSame) {
  for_each_shape([&](const Shape& shape, const Mask& mask) {
    for (Index h = 0; h < kHeads; ++h) {
      for (Index q = shape.first_query() - 2; q < shape.keys + 2; ++q) {
        for (Index begin = 0; begin <= shape.keys; ++begin) {
          for (Index end = begin; end <= shape.keys + 2; ++end) {
            const Index alike = mask.alike(h, q, {begin, end});
            ASSERT_GE(alike, 1);
            std::vector<Range> first;
            mask.spans(h, q, {begin, end}, first);
            for (Index other = q + 1; other < shape.keys + 3 && other - q < alike; ++other) {
              std::vector<Range> spans;
              mask.spans(h, other, {begin, end}, spans);
              ASSERT_EQ(spans, first)
                  << h << ' ' << q << ' ' << other << ' ' << begin << ' ' << end;
            }
          }
        }
      }
    }
  });
}

TEST_P(EveryMask, StepDividesHowFarAllowedPairsAreApart) {
  for_each_shape([&](const Shape& shape, const Mask& mask) {
    for (Index h = 0; h < kHeads; ++h) {
      ASSERT_GE(mask.step(h), 1);
      for (Index q = shape.first_query(); q < shape.keys; ++q) {
        for (Index k = 0; k < shape.keys; ++k) {
          if (!mask.allows(h, q, k)) continue;
          ASSERT_EQ((k - q) % mask.step(h), 0) << h << ' ' << q << ' ' << k;
        }
      }
    }
  });
}

TEST_P(EveryMask, MembersAreTheAllowedKeysOfARun) {
  for_each_shape([&](const Shape& shape, const Mask& mask) {
    for (Index h = 0; h < kHeads; ++h) {
      for (Index q = shape.first_query() - 2; q < shape.keys + 2; ++q) {
        for (const Index step : {1, 2, 3, 6}) {
          for (Index first = 0; first < std::min(step + 2, shape.keys); ++first) {
            const dattn::Run run{first, (shape.keys - first + step - 1) / step, step};
            std::vector<Range> found{{5, 6}};  // somebody else's
            mask.members(h, q, run, found);
            std::vector<Range> right{{5, 6}};
            for (Index i = 0; i < run.count; ++i) {
              if (mask.allows(h, q, run.at(i))) append(right, 1, {i, i + 1});
            }
            ASSERT_EQ(found, right) << h << ' ' << q << ' ' << first << ' ' << step;
          }
        }
      }
    }
  });
}

TEST_P(EveryMask, ApartItAllowsEachPairOnce) {
  for_each_shape([&](const Shape& shape, const Mask& mask) {
    for (Index h = 0; h < kHeads; ++h) {
      const std::vector<MaskPtr> parts = mask.apart(h);
      if (parts.empty()) continue;
      EXPECT_GT(parts.back()->step(h), mask.step(h));
      for (Index q = shape.first_query(); q < shape.keys; ++q) {
        for (Index k = 0; k < shape.keys; ++k) {
          Index times = 0;
          for (const MaskPtr& part : parts) times += part->allows(h, q, k) ? 1 : 0;
          ASSERT_EQ(times, mask.allows(h, q, k) ? 1 : 0) << h << ' ' << q << ' ' << k;
        }
        for (const MaskPtr& part : parts) {
          for (Index begin = 0; begin < shape.keys; ++begin) {
            std::vector<Range> found{{5, 6}};  // somebody else's
            part->spans(h, q, {begin, shape.keys}, found);
            std::vector<Range> right{{5, 6}};
            for (Index k = begin; k < shape.keys; ++k) {
              if (part->allows(h, q, k)) append(right, 1, {k, k + 1});
            }
            ASSERT_EQ(found, right) << h << ' ' << q << ' ' << begin;
            for (Index end = q + 1; end <= shape.keys; ++end) {
              Index pairs = 0;
              for (Index row = q; row < end; ++row) {
                for (Index k = begin; k < shape.keys; ++k) pairs += part->allows(h, row, k) ? 1 : 0;
              }
              const bool all = pairs == (end - q) * (shape.keys - begin);
              ASSERT_EQ(part->cover(h, {q, end}, {begin, shape.keys}), pairs == 0 ? Cover::None
                                                                       : all      ? Cover::All
                                                                                  : Cover::Some);
            }
          }
        }
      }
    }
  });
}

TEST(Step, IsWhatTheMaskIsDilatedBy) {
  const auto step = [](const std::string& words, Index keys = 120) {
    return parse_mask(words, {.queries = keys, .keys = keys})->step(0);
  };
  EXPECT_EQ(step("causal"), 1);
  EXPECT_EQ(step("dilated:4,0,6"), 6);
  EXPECT_EQ(step("causal+dilated:4,0,6"), 6);
  EXPECT_EQ(step("dilated:9,9,4+dilated:9,9,6"), 12);
  EXPECT_EQ(step("dilated:9,9,4/dilated:9,9,6"), 2);
  EXPECT_EQ(step("neighbor:dims=10x12,window=3x2,dilation=2x4"), 4);
  EXPECT_EQ(step("neighbor:dims=10x12,window=3x1,dilation=2x1"), 24);
  EXPECT_EQ(step("neighbor:dims=10x12,window=3x2,dilation=2x4,tile=5x6"), 1);
}

TEST_P(EveryMask, WordsMakeTheSameMaskAgain) {
  for_each_shape([&](const Shape& shape, const Mask& mask) {
    const MaskPtr again = parse_mask(mask.spec(), shape, open_blocks);
    EXPECT_EQ(again->spec(), mask.spec());
    for (Index h = 0; h < kHeads; ++h) {
      EXPECT_EQ(again->variant(h), mask.variant(h));
      for (Index q = shape.first_query(); q < shape.keys; ++q) {
        for (Index k = 0; k < shape.keys; ++k) {
          ASSERT_EQ(again->allows(h, q, k), mask.allows(h, q, k)) << mask.spec();
        }
      }
    }
  });
}

TEST_P(EveryMask, HeadsOfOneVariantSeeTheSamePairs) {
  for_each_shape([&](const Shape& shape, const Mask& mask) {
    for (Index h = 1; h < kHeads; ++h) {
      if (mask.variant(h) != mask.variant(0)) continue;
      for (Index q = shape.first_query(); q < shape.keys; ++q) {
        for (Index k = 0; k < shape.keys; ++k) {
          ASSERT_EQ(mask.allows(h, q, k), mask.allows(0, q, k));
        }
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Table, EveryMask, testing::Range<std::size_t>(0, mask_cases().size()),
                         [](const auto& one) {
                           std::string name = mask_cases()[one.param].spec;
                           for (char& c : name) c = std::isalnum(c) != 0 ? c : '_';
                           return std::to_string(one.param) + "_" + name;
                         });

TEST(S2, QueryHeadsOfAKeyHeadShareItsShard) {
  const Shape shape{.queries = 11, .keys = 11, .query_heads = 6, .key_heads = 3, .value_heads = 3};
  const MaskPtr mask = parse_mask("s2:block=1,local=1,stride=4,dense=1,step=1", shape);
  const Allowed allowed = s2({1, 1, 4, 0, 1, 1}, 2);
  for (Index h = 0; h < 6; ++h) {
    for (Index q = 0; q < 11; ++q) {
      for (Index k = 0; k < 11; ++k) ASSERT_EQ(mask->allows(h, q, k), allowed(h, q, k));
    }
    EXPECT_EQ(mask->variant(h), mask->variant(h / 2 * 2));
  }
}

TEST(S2, ShardsOfAllHeadsHoldEveryKeyAndADroppedKeyStaysDropped) {
  const Shape shape{.queries = 64, .keys = 64, .query_heads = 8, .key_heads = 8, .value_heads = 8};
  const MaskPtr mask = parse_mask("s2:block=4,local=2,stride=8", shape);
  for (Index k = 0; k < 64; ++k) {
    bool kept = false;
    for (Index h = 0; h < 8; ++h) {
      kept = kept || mask->allows(h, 63, k);
      for (Index q = k + 4; q < 64; ++q) {
        EXPECT_LE(mask->allows(h, q, k), mask->allows(h, q - 1, k)) << h << ' ' << q << ' ' << k;
      }
    }
    EXPECT_TRUE(kept) << k;
  }
}

TEST(Blocks, ListsAreForAllHeadsForKeyHeadsOrForQueryHeads) {
  const Shape shape{.queries = 5, .keys = 5, .query_heads = 4, .key_heads = 2, .value_heads = 2};
  for (const Index lists : {0, 1, 2, 4}) {
    const MaskPtr mask = parse_mask(block_words(2, 1, lists, 5), shape, open_blocks);
    EXPECT_EQ(mask->heads(), lists < 2 ? 1 : 4);
    for (Index h = 0; h < 4; ++h) {
      const Index list = lists < 2 ? 0 : lists == 2 ? h / 2 : h;
      for (Index q = 0; q < 5; ++q) {
        for (Index k = 0; k < 5; ++k) {
          ASSERT_EQ(mask->allows(h, q, k), block_listed(list, q / 2, k)) << lists << ' ' << h;
        }
      }
    }
  }
}

TEST(Blocks, EqualListsAreOneVariant) {
  const Shape shape{.queries = 4, .keys = 4, .query_heads = 3, .key_heads = 3, .value_heads = 3};
  const BlockLists lists{.query_block = 2,
                         .key_block = 2,
                         .rows = {0, 1, 2, 0, 1, 3, 0, 1, 2},
                         .columns = {0, 1, 0, 0, 1, 0, 1}};
  const MaskPtr mask = blocks_mask(lists, shape);
  EXPECT_EQ(mask->variant(0), mask->variant(2));
  EXPECT_NE(mask->variant(0), mask->variant(1));
}

TEST(EveryMask, TheTableNamesEveryKind) {
  for (const MaskKind& kind : mask_kinds()) {
    const auto begins = [&](const MaskCase& c) {
      return c.spec == kind.name || c.spec.starts_with(std::string(kind.name) + ":");
    };
    EXPECT_TRUE(std::any_of(mask_cases().begin(), mask_cases().end(), begins)) << kind.name;
  }
}

}  // namespace
}  // namespace dattn
