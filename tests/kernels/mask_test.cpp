// spans and cover of every mask are held to its `allows`, and `allows` to a definition written
// here.
#include "kernels/mask.hpp"

#include <gmock/gmock.h>

#include <functional>

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
Allowed operator+(Allowed a, Allowed b) {
  return [=](Index h, Index q, Index k) { return a(h, q, k) && b(h, q, k); };
}
Allowed operator/(Allowed a, Allowed b) {
  return [=](Index h, Index q, Index k) { return a(h, q, k) || b(h, q, k); };
}

struct Case {
  std::string spec;
  Allowed allowed;
};

constexpr Index kKeys = 11;
constexpr Index kHeads = 3;

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
  };
  return table;
}

/// As many queries as keys, fewer, and more: query positions are then negative.
class EveryMask : public testing::TestWithParam<std::size_t> {
 protected:
  void for_each_shape(const std::function<void(const Shape&, const Mask&)>& check) const {
    for (const Index queries : {kKeys, Index{4}, Index{17}}) {
      const Shape shape{.queries = queries, .keys = kKeys, .query_heads = kHeads};
      check(shape, *parse_mask(spec(), shape));
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

TEST_P(EveryMask, WordsMakeTheSameMaskAgain) {
  for_each_shape([&](const Shape& shape, const Mask& mask) {
    const MaskPtr again = parse_mask(mask.spec(), shape);
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
