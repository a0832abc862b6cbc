// Keys are cut into parts by what some row sees of them: others of a batch cost a sequence nothing.
#include <gtest/gtest.h>

#include "kernels/live.hpp"
#include "kernels/partial.hpp"

namespace dattn {
namespace {

TEST(SeenKeys, AreCutEvenly) {
  const Ranges seen{{3, 5}, {10, 17}, {40, 41}};
  EXPECT_EQ(even_cuts(seen, 1), (std::vector<Range>{{3, 41}}));
  EXPECT_EQ(even_cuts(seen, 2), (std::vector<Range>{{3, 13}, {13, 41}}));
  EXPECT_EQ(even_cuts(seen, 5),
            (std::vector<Range>{{3, 5}, {10, 12}, {12, 14}, {14, 16}, {16, 41}}));
  EXPECT_EQ(even_cuts(seen, 10).back(), (Range{40, 41}));
}

TEST(SeenKeys, AreThoseOfAllRows) {
  const Shape shape{.queries = 3, .keys = 12};
  const MaskPtr mask = parse_mask("batch:sequences=3,suffix=4", shape);
  const Where where{shape, {0, 1}, {0, 1}, {0, 1}, {{9, 3, 1}}, {{1, 6, 2}}};  // keys 1, 3, ... 11
  const auto seen = [&](Range rows) {
    const LiveRows live(where, *mask, 0, rows);
    return keys_seen({&live, 1});
  };
  EXPECT_EQ(seen({0, 1}), (Ranges{{0, 2}}));
  EXPECT_EQ(seen({1, 3}), (Ranges{{2, 6}}));
  const LiveRows apart[] = {LiveRows(where, *mask, 0, {0, 1}), LiveRows(where, *mask, 0, {2, 3})};
  EXPECT_EQ(keys_seen(apart), (Ranges{{0, 2}, {4, 6}}));
}

/// What a sequence of a batch finds in the cache of all, or in its own keys alone: to the bit the
/// same, since it takes its keys in the same parts. Each rank that tokens were dealt to has some,
/// rank behind rank.
template <class E>
void expect_the_bits_of_a_sequence_alone(const Isa* isa, Index heads, int ranks) {
  constexpr Index kSequences = 40;  // more than a kernel has parts for
  constexpr Index kOwn = 1536;      // of each rank: whole tiles and blocks of any kernel
  const Index keys = kSequences * kOwn * ranks;
  const Shape shape{kSequences, keys, heads, 1, 1, 24, 16};
  const std::string own = std::to_string(kOwn * ranks);
  const MaskPtr mask = parse_mask("batch:sequences=40,suffix=" + own, shape);
  const auto drawn = [](Index count, std::uint64_t x) {
    std::vector<E> numbers(static_cast<std::size_t>(count));
    for (E& number : numbers) {
      x = x * 6364136223846793005ULL + 1442695040888963407ULL;  // Knuth's MMIX generator
      number = E(static_cast<float>(static_cast<std::int64_t>(x) >> 40) * 0x1p-22F);
    }
    return numbers;
  };
  const std::vector<E> q = drawn(heads * 24, 1);
  const std::vector<E> k = drawn(keys * 24, 2);
  const std::vector<E> v = drawn(keys * 16, 3);
  const auto found = [&](Index s, const Runs& positions, const E* some_k, const E* some_v) {
    std::vector<float> records(static_cast<std::size_t>(heads * 18));
    const View<float> out{records.data(), 1, heads, 18};
    clear(out);
    const Index count = size(positions);
    attend(View<const E>{q.data(), 1, heads, 24}, View<const E>{some_k, count, 1, 24},
           View<const E>{some_v, count, 1, 16}, out,
           {shape, {0, heads}, {0, 1}, {0, 1}, {{shape.first_query() + s, 1, 1}}, positions}, *mask,
           {.isa = isa});
    return records;
  };
  for (const Index s : {Index{0}, Index{17}, kSequences - 1}) {
    Runs all, alone;
    std::vector<E> own_k, own_v;
    for (int r = 0; r < ranks; ++r) {
      all.push_back({r, kSequences * kOwn, ranks});
      alone.push_back({s * kOwn * ranks + r, kOwn, ranks});
      const Index first = (r * kSequences + s) * kOwn;
      own_k.insert(own_k.end(), k.begin() + first * 24, k.begin() + (first + kOwn) * 24);
      own_v.insert(own_v.end(), v.begin() + first * 16, v.begin() + (first + kOwn) * 16);
    }
    EXPECT_EQ(found(s, all, k.data(), v.data()), found(s, alone, own_k.data(), own_v.data()))
        << isa->name << ", " << heads << " heads, " << ranks << " ranks, sequence " << s;
  }
}

TEST(SeenKeys, OfASequenceGiveItsBitsAmongOthers) {
  for (const Isa* isa : available_isas()) {
    for (const Index heads : {3, 16, 40}) {  // decode, and panels
      expect_the_bits_of_a_sequence_alone<float>(isa, heads, 1);
      expect_the_bits_of_a_sequence_alone<BFloat16>(isa, heads, 2);
    }
  }
}

}  // namespace
}  // namespace dattn
