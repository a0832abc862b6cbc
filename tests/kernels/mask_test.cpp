// spans and cover of every mask are held to its `allows`, and `allows` to a definition written
// here.
#include "kernels/mask.hpp"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "kernels/masks/blocks.hpp"
#include "tests/block_files.hpp"

namespace dattn {
namespace {

/// The word behind the colon as counts.
std::vector<Index> counts(const std::string& text) { return parse_counts(text, "test"); }

using Allowed = std::function<bool(Index head, Index query, Index key)>;

Allowed full() {
  return [](Index, Index, Index) { return true; };
}
Allowed causal() {
  return [](Index, Index q, Index k) { return q - k >= 0; };
}
Allowed window(Index left, Index right) {
  return [=](Index, Index q, Index k) { return k - q >= -left && k - q <= right; };
}
Allowed prefix(Index n) {
  return [=](Index, Index q, Index k) { return k <= n - 1 || q - k >= 0; };
}
Allowed sink(Index n) {
  return [=](Index, Index, Index k) { return k <= n - 1; };
}
Allowed documents(const std::string& lengths) {
  std::vector<Index> owner;
  for (Index d = 0; const Index n : counts(lengths)) {
    for (Index i = 0; i < n; ++i) owner.push_back(d);
    ++d;
  }
  return [owner](Index, Index q, Index k) {
    const auto last = static_cast<Index>(owner.size());
    if (q < 0 || q >= last || k < 0 || k >= last) return false;
    return owner[static_cast<std::size_t>(q)] == owner[static_cast<std::size_t>(k)];
  };
}
Allowed stream(Index sink, Index recent) {
  return [=](Index, Index q, Index k) { return q - k >= 0 && (k < sink || k > q - recent); };
}
Allowed dilated(Index left, Index right, Index step) {
  return [=](Index, Index q, Index k) {
    for (Index j = -left; j <= right; ++j) {
      if (q + j * step == k) return true;
    }
    return false;
  };
}
struct Sharded {
  Index block, local, stride, offset = 0, step = 1, dense = 0;
};
/// Of three key heads; query heads read one each, or two.
Allowed s2(Sharded s, Index heads_of_key = 1, Index key_heads = 3) {
  return [=](Index h, Index q, Index k) {
    if (k > q) return false;
    const Index head = h / heads_of_key;
    if (head >= key_heads - s.dense) return true;
    return q / s.block - k / s.block < s.local ||
           (k / s.block + head * s.step + s.offset) % s.stride == 0;
  };
}
Allowed s2_relative(Index block, Index left, Index right, Index stride, Index dense = 0) {
  return [=](Index h, Index q, Index k) {
    if (h >= 3 - dense) return true;
    // From the query's block towards the key's: the local ones, then one in `stride`.
    const double at = std::floor(static_cast<double>(q) / static_cast<double>(block));
    const Index apart = k / block - static_cast<Index>(at);
    const Index local = apart < 0 ? left : right;
    const Index away = std::abs(apart);
    return away < local || (away - local + 1) % stride == 0;
  };
}

struct Grid {
  std::vector<Index> dims, window;
  std::vector<Index> stride{1, 1, 1}, dilation{1, 1, 1}, causal{0, 0, 0}, tile{99, 99, 99};
};
/// The coordinates of all tokens, in order: tile by tile.
std::vector<std::vector<Index>> tokens(const Grid& g) {
  std::vector<std::vector<Index>> all;
  std::vector<std::vector<Index>> tiles{{}};
  for (std::size_t i = 0; i < g.dims.size(); ++i) {
    std::vector<std::vector<Index>> next;
    for (const auto& tile : tiles) {
      for (Index begin = 0; begin < g.dims[i]; begin += g.tile[i]) {
        next.push_back(tile);
        next.back().push_back(begin);
      }
    }
    tiles = next;
  }
  for (const auto& tile : tiles) {
    std::vector<std::vector<Index>> inside{{}};
    for (std::size_t i = 0; i < g.dims.size(); ++i) {
      std::vector<std::vector<Index>> next;
      for (const auto& point : inside) {
        for (Index x = tile[i]; x < std::min(tile[i] + g.tile[i], g.dims[i]); ++x) {
          next.push_back(point);
          next.back().push_back(x);
        }
      }
      inside = next;
    }
    all.insert(all.end(), inside.begin(), inside.end());
  }
  return all;
}
Allowed neighbor(const Grid& g) {
  const auto along = [g](std::size_t d, Index x, Index y) {
    std::vector<Index> group;  // the coordinates that x may see
    for (Index z = x % g.dilation[d]; z < g.dims[d]; z += g.dilation[d]) group.push_back(z);
    const auto count = static_cast<Index>(group.size());
    const auto i = std::find(group.begin(), group.end(), x) - group.begin();
    const Index w = g.window[d];
    std::vector<Index> stride;  // those that share x's leader
    for (Index z = 0; z < g.stride[d]; ++z) stride.push_back(i / g.stride[d] * g.stride[d] + z);
    Index begin = 0;
    Index end = 0;
    if (g.causal[d] != 0) {
      end = std::min(stride.back(), count - 1) + 1;
      begin = end - w;
    } else {
      begin = std::min(stride[stride.size() / 2], count - 1) - w / 2;
      end = begin + w;
      for (; begin < 0; ++begin) ++end;
      for (; end > count; --end) --begin;
    }
    for (Index z = std::max<Index>(begin, 0); z < end; ++z) {
      if (g.causal[d] != 0 && z > i) break;
      if (group[static_cast<std::size_t>(z)] == y) return true;
    }
    return false;
  };
  const auto points = tokens(g);
  return [=](Index, Index q, Index k) {
    if (q < 0) return false;
    const auto& a = points[static_cast<std::size_t>(q)];
    const auto& b = points[static_cast<std::size_t>(k)];
    for (std::size_t d = 0; d < a.size(); ++d) {
      if (!along(d, a[d], b[d])) return false;
    }
    return true;
  };
}
/// `lists` of three: 0 or 1 for all heads.
Allowed blocks(Index query_block, Index key_block, Index lists, Index keys = 11) {
  return [=](Index h, Index q, Index k) {
    if (q < 0 || q / query_block > (keys - 1) / query_block) return false;
    return block_listed(lists < 2 ? 0 : h, q / query_block, k / key_block);
  };
}

/// Of one level: how many sequences each group has, and keys.
struct Group {
  Index sequences, keys;
};
/// Says of each key whose it is, and of a sequence's own keys how old: 0 for the newest.
Allowed batch(Index fresh, const std::vector<std::vector<Group>>& levels,
              const std::vector<Index>& suffix) {
  struct Key {
    Range sequences;
    Index age;
  };
  std::vector<Key> keys;
  for (const auto& level : levels) {
    for (Index first = 0; const Group& group : level) {
      for (Index i = 0; i < group.keys; ++i) keys.push_back({{first, first + group.sequences}, 99});
      first += group.sequences;
    }
  }
  for (Index s = 0; const Index length : suffix) {
    for (Index age = length - 1; age >= 0; --age) keys.push_back({{s, s + 1}, age});
    ++s;
  }
  const Index sequences = std::ssize(suffix);
  return [=](Index, Index q, Index k) {
    const Index row = q - (std::ssize(keys) - sequences * fresh);
    if (row < 0 || row >= sequences * fresh || k >= std::ssize(keys)) return false;
    const Key& key = keys[static_cast<std::size_t>(k)];
    const Index age = fresh - 1 - row % fresh;
    return key.sequences.contains(row / fresh) && key.age >= age;
  };
}
Allowed operator+(Allowed a, Allowed b) {
  return [=](Index h, Index q, Index k) { return a(h, q, k) && b(h, q, k); };
}
Allowed operator/(Allowed a, Allowed b) {
  return [=](Index h, Index q, Index k) { return a(h, q, k) || b(h, q, k); };
}

constexpr Index kKeys = 11;
constexpr Index kHeads = 3;

struct Case {
  std::string spec;
  Allowed allowed;
  Index keys = kKeys;
  Index queries = 0;  ///< where the mask takes no other number
};

const std::vector<Case>& cases() {
  static const std::vector<Case> table{
      {"full", full()},
      {"causal", causal()},
      {"window:0,0", window(0, 0)},
      {"window:3,0", window(3, 0)},
      {"window:0,5", window(0, 5)},
      {"window:2,1", window(2, 1)},
      {"window:100,100", window(100, 100)},
      {"window:1152921504606846976,0", window(Index{1} << 60, 0)},
      {"documents:11", documents("11")},
      {"documents:3,0,1,5,0,2", documents("3,0,1,5,0,2")},
      {"documents:0,1,1,1,8,0", documents("0,1,1,1,8,0")},
      {"prefix:0", prefix(0)},
      {"prefix:4", prefix(4)},
      {"prefix:99", prefix(99)},
      {"prefix:9223372036854775807", prefix(99)},
      {"sink:0", sink(0)},
      {"sink:3", sink(3)},
      {"sink:99", sink(99)},
      {"causal+window:2,2", causal() + window(2, 2)},
      {"causal+documents:3,4,4", causal() + documents("3,4,4")},
      {"window:2,0/sink:2", window(2, 0) / sink(2)},
      {"causal+window:2,0/sink:2", (causal() + window(2, 0)) / sink(2)},
      {"sink:2/causal+window:2,0", sink(2) / (causal() + window(2, 0))},
      {"causal+(window:1,1/sink:1)", causal() + (window(1, 1) / sink(1))},
      {"(causal)", causal()},
      {"((sink:1/window:0,1)+causal)/documents:5,6",
       ((sink(1) / window(0, 1)) + causal()) / documents("5,6")},
      {"(sink:4/window:1,0)+(causal/sink:1)+full", (sink(4) / window(1, 0)) + (causal() / sink(1))},
      {"causal+sink:0", sink(0)},
      {"sink:6/window:0,9", sink(6) / window(0, 9)},
      {"causal@0;full@1;window:1,0/sink:1@2",
       [](Index h, Index q, Index k) {
         return h == 0   ? causal()(h, q, k)
                : h == 1 ? full()(h, q, k)
                         : (window(1, 0) / sink(1))(h, q, k);
       }},
      {"causal@0-1;sink:1@2-2",
       [](Index h, Index q, Index k) { return h < 2 ? causal()(h, q, k) : sink(1)(h, q, k); }},
      {"window:1,1@0-2", window(1, 1)},
      {"stream:sink=2,recent=3", stream(2, 3)},
      {"stream:recent=1,sink=0", stream(0, 1)},
      {"stream:sink=3,recent=0", stream(3, 0)},
      {"stream:sink=0,recent=0", [](Index, Index, Index) { return false; }},
      {"stream", causal()},
      {"span:alpha=2,beta=0.3,sink=1,least=2,unit=2", stream(1, 5)},
      {"span:beta=0.5,sink=2,least=7,unit=1", stream(2, 5)},
      {"span:alpha=1e9,sink=4,least=0", causal()},
      {"dilated:2,1,3", dilated(2, 1, 3)},
      {"dilated:0,0,7", dilated(0, 0, 7)},
      {"dilated:3,0,1", window(3, 0)},
      {"dilated:1073741824,0,2", dilated(20, 0, 2)},
      {"causal+dilated:9,9,2", causal() + dilated(9, 9, 2)},
      {"s2:block=1,local=2,stride=3", s2({1, 2, 3})},
      {"s2:block=2,local=1,stride=2,step=1", s2({2, 1, 2})},
      {"s2:block=2,local=1,stride=4,offset=3,step=2", s2({2, 1, 4, 3, 2})},
      {"s2:block=3,local=1,stride=2,dense=1", s2({3, 1, 2, 0, 1, 1})},
      {"s2:block=1,local=1,stride=7,step=0", s2({1, 1, 7, 0, 0})},
      {"s2:block=1,local=1,stride=9", s2({1, 1, 9, 0, 3})},  // step: stride over query heads
      {"s2:stride=1", causal()},
      {"s2", causal()},
      {"s2:relative=1,block=1,local=2x1,stride=3", s2_relative(1, 2, 1, 3)},
      {"s2:relative=1,block=2,local=1,stride=2,dense=2", s2_relative(2, 1, 1, 2, 2)},
      {"s2:relative=1,block=1,local=3x5,stride=1", full()},
      {"s2:block=1,local=1,stride=3/sink:1", s2({1, 1, 3}) / sink(1)},
      {"s2:block=1,local=1,stride=3+window:4,0", s2({1, 1, 3}) + window(4, 0)},
      {"s2:block=1,local=1,stride=3@0-1;full@2",
       [](Index h, Index q, Index k) {
         return h == 2 || s2({1, 1, 3})(h, q, k);
       }},
      {"neighbor:dims=11,window=3", neighbor({{11}, {3}})},
      {"neighbor:dims=11,window=4,stride=3", neighbor({{11}, {4}, {3}})},
      {"neighbor:dims=11,window=5,stride=2,causal=1", neighbor({{11}, {5}, {2}, {1}, {1}})},
      {"neighbor:dims=11,window=2,dilation=4", neighbor({{11}, {2}, {1}, {4}})},
      {"neighbor:dims=11,window=3,dilation=3,causal=1", neighbor({{11}, {3}, {1}, {3}, {1}})},
      {"neighbor:dims=11,window=11", neighbor({{11}, {11}})},
      {"neighbor:dims=3x4,window=2x3", neighbor({{3, 4}, {2, 3}}), 12},
      {"neighbor:dims=4x3,window=3x2,stride=2x1,causal=1x0,tile=2x2",
       neighbor({{4, 3}, {3, 2}, {2, 1}, {1, 1}, {1, 0}, {2, 2}}), 12},
      {"neighbor:dims=2x3x3,window=1x2x3,dilation=2x1x1,tile=2x2x1",
       neighbor({{2, 3, 3}, {1, 2, 3}, {1, 1, 1}, {2, 1, 1}, {0, 0, 0}, {2, 2, 1}}), 18},
      {"neighbor:dims=3x4,window=1x2,dilation=3x2,tile=3",
       neighbor({{3, 4}, {1, 2}, {1, 1}, {3, 2}, {0, 0}, {3, 3}}), 12},
      {block_words(3, 2, 0, 11), blocks(3, 2, 0)},
      {block_words(2, 3, 1, 11), blocks(2, 3, 1)},
      {block_words(4, 1, 3, 11), blocks(4, 1, 3)},
      {block_words(11, 11, 3, 11), blocks(11, 11, 3)},
      {"causal+" + block_words(2, 2, 3, 11), causal() + blocks(2, 2, 3)},
      {"(" + block_words(3, 4, 3, 11) + "/sink:1)+window:6,1",
       (blocks(3, 4, 3) / sink(1)) + window(6, 1)},
      {block_words(2, 2, 3, 11) + "@0-1;causal@2",
       [](Index h, Index q, Index k) {
         return h < 2 ? blocks(2, 2, 3)(h, q, k) : causal()(h, q, k);
       }},
      {"batch:sequences=3,suffix=2", batch(1, {}, {2, 2, 2}), 6, 3},
      {"batch:sequences=1,new=5", batch(5, {}, {5}), 5, 5},
      {"batch:sequences=3,new=2,suffix=2:4:3", batch(2, {}, {2, 4, 3}), 9, 6},
      {"batch:sequences=4,levels=1x3", batch(1, {{{4, 3}}}, {1, 1, 1, 1}), 7, 4},
      {"batch:sequences=5,levels=2x3,suffix=2", batch(1, {{{2, 3}, {3, 3}}}, {2, 2, 2, 2, 2}), 16,
       5},
      {"batch:sequences=3,new=3,levels=1x2:2x1:3x2,suffix=3:5:4",
       batch(3, {{{3, 2}}, {{1, 1}, {2, 1}}, {{1, 2}, {1, 2}, {1, 2}}}, {3, 5, 4}), 22, 9},
      {"batch:sequences=5,new=2,levels=1x1:2x3x1,sizes=5:1x4,suffix=2:2:3:2:4",
       batch(2, {{{5, 1}}, {{1, 3}, {4, 1}}}, {2, 2, 3, 2, 4}), 18, 10},
      {"batch:sequences=4,suffix=1,longest=5,seed=7", batch(1, {}, {1, 3, 5, 1}), 10, 4},
      {"batch:sequences=2,new=2,levels=1x3,suffix=3+(window:3,0/sink:2)",
       batch(2, {{{2, 3}}}, {3, 3}) + (window(3, 0) / sink(2)), 9, 4},
  };
  return table;
}

/// As many queries as keys, fewer, and more: query positions are then negative.
class EveryMask : public testing::TestWithParam<std::size_t> {
 protected:
  void for_each_shape(const std::function<void(const Shape&, const Mask&)>& check) const {
    const Index keys = cases()[GetParam()].keys;
    const Index only = cases()[GetParam()].queries;
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
  const std::string& spec() const { return cases()[GetParam()].spec; }
  const Allowed& allowed() const { return cases()[GetParam()].allowed; }
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

TEST_P(EveryMask, CoverIsExactForEveryTile) {
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

INSTANTIATE_TEST_SUITE_P(Table, EveryMask, testing::Range<std::size_t>(0, cases().size()),
                         [](const auto& one) {
                           std::string name = cases()[one.param].spec;
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
    const auto begins = [&](const Case& c) {
      return c.spec == kind.name || c.spec.starts_with(std::string(kind.name) + ":");
    };
    EXPECT_TRUE(std::any_of(cases().begin(), cases().end(), begins)) << kind.name;
  }
}

}  // namespace
}  // namespace dattn
