// Attention against what is known without any attention code, and at the edges of the numbers.
#include <gmock/gmock.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>

#include "tests/kernels/problem.hpp"

namespace dattn {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
const std::vector<std::string> kMasks{
    "full", "causal", "window:20,10", "documents:60,1,69", "prefix:50", "window:9,0/sink:3"};
const Shape kShape{140, 130, 2, 1, 2, 24, 20};  // under causal, rows 0..9 see no key

class Oracle : public testing::TestWithParam<const Isa*> {
 protected:
  Finished<float> result(const Problem<float>& problem) const {
    return Finished<float>(attend_whole(problem, {.isa = GetParam()}));
  }
};

std::vector<Index> allowed_keys(const Problem<float>& p, Index head, Index row) {
  std::vector<Index> keys;
  for (Index k = 0; k < p.shape.keys; ++k) {
    if (p.mask->allows(head, row + p.shape.first_query(), k)) keys.push_back(k);
  }
  return keys;
}

/// For each row of each head: its allowed keys, its O and its LSE.
template <class Check>
void for_each_row(const Problem<float>& p, const Finished<float>& found, const Check& check) {
  for (Index row = 0; row < p.shape.queries; ++row) {
    for (Index h = 0; h < p.shape.query_heads; ++h) {
      SCOPED_TRACE("row " + std::to_string(row) + " head " + std::to_string(h) + " " +
                   p.mask->spec());
      const auto d_v = static_cast<std::size_t>(p.shape.d_v);
      check(h, allowed_keys(p, h, row), std::span(found.o.view().at(row, h), d_v),
            found.lse.view().at(row, h)[0]);
    }
  }
}

TEST_P(Oracle, EqualScoresGiveTheMeanAndTheLogOfTheCount) {
  for (const std::string& mask : kMasks) {
    auto p = random_problem<float>(kShape, mask);
    for (const bool zero_queries : {true, false}) {
      // Either Q = 0, or all keys equal: then LSE = score + log(count).
      std::fill(p.q.numbers.begin(), p.q.numbers.end(), zero_queries ? 0.0f : 0.5f);
      if (!zero_queries) std::fill(p.k.numbers.begin(), p.k.numbers.end(), 0.25f);
      const double score = zero_queries ? 0 : p.score.scale * 0.125 * static_cast<double>(kShape.d_qk);
      for_each_row(p, result(p), [&](Index h, const auto& keys, auto o, float lse) {
        if (keys.empty()) {
          EXPECT_EQ(lse, -kInf);
          for (const float x : o) EXPECT_EQ(x, 0);
          return;
        }
        const auto count = static_cast<double>(keys.size());
        EXPECT_NEAR(lse, score + std::log(count), 1e-6);
        for (std::size_t i = 0; i < o.size(); ++i) {
          double mean = 0;
          for (const Index k : keys)
            mean += static_cast<double>(p.v.at(k, h, static_cast<Index>(i)));
          EXPECT_NEAR(o[i], mean / count, 1e-6);
        }
      });
    }
  }
}

TEST_P(Oracle, ConstantValuesComeBack) {
  for (const std::string& mask : kMasks) {
    auto p = random_problem<float>(kShape, mask);
    std::fill(p.v.numbers.begin(), p.v.numbers.end(), -3.0f);
    for_each_row(p, result(p), [&](Index, const auto& keys, auto o, float lse) {
      EXPECT_EQ(std::isinf(lse), keys.empty());
      for (const float x : o) EXPECT_NEAR(x, keys.empty() ? 0.0 : -3.0, 3e-6);
    });
  }
}

TEST_P(Oracle, ScoresOfTenThousandPickTheBestKey) {
  Shape shape = kShape;
  shape.d_qk = 1;
  for (const std::string& mask : kMasks) {
    auto p = random_problem<float>(shape, mask);
    std::fill(p.q.numbers.begin(), p.q.numbers.end(), 100.0f);
    // Scores -10000 .. 10000 in a shuffled order, at least 100 apart.
    for (Index k = 0; k < shape.keys; ++k) {
      p.k.at(k, 0, 0) = -100.0f + 200.0f / 129.0f * static_cast<float>(k * 47 % 130);
    }
    for_each_row(p, result(p), [&](Index h, const auto& keys, auto o, float lse) {
      if (keys.empty()) return;
      const auto by_score = [&](Index a, Index b) { return p.k.at(a, 0, 0) < p.k.at(b, 0, 0); };
      const Index best = *std::max_element(keys.begin(), keys.end(), by_score);
      EXPECT_NEAR(lse, 100.0 * static_cast<double>(p.k.at(best, 0, 0)), 1e-2);
      for (std::size_t i = 0; i < o.size(); ++i) {
        EXPECT_EQ(o[i], p.v.at(best, h, static_cast<Index>(i)));
      }
    });
  }
}

TEST_P(Oracle, DenormalInputsAreAlmostZeros) {
  auto p = random_problem<float>(kShape, "causal");
  for (auto* t : {&p.q, &p.k, &p.v}) {
    for (float& x : t->numbers) x *= 1e-40f;
  }
  for_each_row(p, result(p), [&](Index, const auto& keys, auto o, float lse) {
    const auto count = static_cast<double>(keys.size());
    EXPECT_NEAR(std::exp(static_cast<double>(lse)), count, 1e-6 * count);
    for (const float x : o) EXPECT_LE(std::abs(x), 1e-39f);
  });
}

TEST_P(Oracle, OverflowIsShownAndDoesNotHang) {
  auto p = random_problem<float>(kShape, "causal");
  for (float& x : p.q.numbers) x = 1e30f;
  for (float& x : p.k.numbers) x = 1e30f;  // every score is +inf
  for_each_row(p, result(p), [&](Index, const auto& keys, auto o, float lse) {
    EXPECT_EQ(std::isfinite(lse), false);
    EXPECT_EQ(lse == -kInf, keys.empty());
    for (const float x : o) EXPECT_EQ(std::isnan(x), !keys.empty());
  });
  // Scores of -inf weigh nothing: such a row is one without keys.
  for (float& x : p.k.numbers) x = -1e30f;
  for_each_row(p, result(p), [&](Index, const auto&, auto o, float lse) {
    EXPECT_EQ(lse, -kInf);
    for (const float x : o) EXPECT_EQ(x, 0);
  });
  // Large values alone are no overflow.
  p = random_problem<float>(kShape, "causal");
  for (float& x : p.v.numbers) x = 1e30f;
  for_each_row(p, result(p), [&](Index, const auto& keys, auto o, float) {
    for (const float x : o) EXPECT_NEAR(x / 1e30, keys.empty() ? 0 : 1, 1e-6);
  });
}

/// Puts `bad` into one element and expects exactly the rows that see it to show it, the others to
/// keep every bit.
TEST_P(Oracle, NaNAndInfinityReachExactlyTheRowsThatSeeThem) {
  for (const std::string& mask : kMasks) {
    const auto clean = random_problem<float>(kShape, mask);
    const Finished<float> right = result(clean);
    for (const float bad : {kNan, kInf, -kInf}) {
      for (const Index at : {0, 61, 95, 96, 129}) {
        for (const bool in_values : {true, false}) {
          auto p = clean;
          (in_values ? p.v : p.k).at(at, 0, 5) = bad;
          const Finished<float> found = result(p);
          for (Index row = 0; row < kShape.queries; ++row) {
            for (Index h = 0; h < kShape.query_heads; ++h) {
              SCOPED_TRACE(mask + " key " + std::to_string(at) + " row " + std::to_string(row));
              const bool reads = !in_values || kShape.value_head(h) == 0;
              const bool sees = reads && p.mask->allows(h, row + kShape.first_query(), at);
              for (Index i = 0; i < kShape.d_v; ++i) {
                const float x = found.o.view().at(row, h)[i];
                const float y = right.o.view().at(row, h)[i];
                const bool hit = sees && (!in_values || i == 5);
                if (!hit) {
                  ASSERT_EQ(x, y);
                } else if (in_values && std::isinf(bad)) {
                  ASSERT_EQ(x, bad);
                } else if (std::isnan(bad)) {
                  ASSERT_TRUE(std::isnan(x));
                }  // an infinite key gives a score of +inf (NaN) or of -inf (weight 0)
              }
              const float lse = found.lse.view().at(row, h)[0];
              const float lse_right = right.lse.view().at(row, h)[0];
              if (sees && !in_values) {
                ASSERT_TRUE(std::isnan(lse) || !std::isnan(bad));
              } else {
                ASSERT_EQ(lse, lse_right);
              }
            }
          }
        }
      }
    }
  }
}

TEST_P(Oracle, ARowOfNaNScoresOnlyIsNaN) {
  auto p = random_problem<float>(kShape, "causal");
  std::fill(p.k.numbers.begin(), p.k.numbers.end(), kNan);
  for_each_row(p, result(p), [&](Index, const auto& keys, auto o, float lse) {
    EXPECT_EQ(std::isnan(lse), !keys.empty());
    for (const float x : o) EXPECT_EQ(std::isnan(x), !keys.empty());
  });
  // One query row of NaN is the business of that row alone.
  p = random_problem<float>(kShape, "full");
  p.q.at(70, 1, 3) = kNan;
  const Finished<float> found = result(p);
  for (Index row = 0; row < kShape.queries; ++row) {
    for (Index h = 0; h < 2; ++h) {
      EXPECT_EQ(std::isnan(found.lse.view().at(row, h)[0]), row == 70 && h == 1);
    }
  }
}

TEST_P(Oracle, RowsWithoutKeysKeepWhatThePartialHeld) {
  auto p = random_problem<float>(kShape, "sink:0");
  const Where where = everything(kShape);
  auto out = random_tensor<float>(140, 2, 22, 9);
  const auto before = out.numbers;
  attend_block(p, where, {.isa = GetParam()}, out);
  EXPECT_EQ(out.numbers, before);
}

TEST_P(Oracle, NothingToReadOrWriteIsNoWork) {
  const auto p = random_problem<float>(kShape, "full");
  Where where = everything(kShape);
  where.keys = {};
  auto out = empty_partial<float>(where);
  const auto before = out.numbers;
  attend_block(p, where, {.isa = GetParam()}, out);
  EXPECT_EQ(out.numbers, before);
  where = everything(kShape);
  where.queries = {{0, 0, 1}};
  auto none = empty_partial<float>(where);
  attend_block(p, where, {.isa = GetParam()}, none);
}

INSTANTIATE_TEST_SUITE_P(Isa, Oracle,
                         testing::ValuesIn(available_isas().begin(), available_isas().end()),
                         [](const auto& one) { return std::string(one.param->name); });

template <class T>
class Poll : public testing::Test {};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Poll, Types);

TYPED_TEST(Poll, IsCalledByTheCallingThread) {
  const auto p = random_problem<TypeParam>({2000, 3000, 4, 1, 1, 8, 8}, "full");
  std::atomic<int> calls = 0;
  std::atomic<int> strangers = 0;
  const auto caller = std::this_thread::get_id();
  const auto poll = [&] { ++(std::this_thread::get_id() == caller ? calls : strangers); };
  const auto polled = attend_whole(p, {.poll = poll});
  EXPECT_GT(calls, 100);
  attend_whole(p, {.threads = 3, .poll = poll});
  EXPECT_EQ(strangers, 0);
  EXPECT_EQ(polled.numbers, attend_whole(p, {}).numbers);
}

TYPED_TEST(Poll, MayThrow) {
  const auto p = random_problem<TypeParam>({400, 300, 4, 1, 1, 8, 8}, "full");
  int calls = 0;
  const auto poll = [&] {
    if (++calls == 3) throw std::runtime_error("the peer is gone");
  };
  EXPECT_THROW(attend_whole(p, {.poll = poll}), std::runtime_error);
  EXPECT_EQ(calls, 3) << "none after the one that failed";
}

TEST(Contract, IsChecked) {
  const auto p = random_problem<float>(kShape, "full");
  EXPECT_DEATH(attend_whole(p, {.threads = 0}), "threads >= 1");
  Where where = everything(kShape);
  where.key_heads = {0, 0};
  auto out = empty_partial<float>(where);
  EXPECT_DEATH(attend_block(p, where, {}, out), "key_heads.contains");
}

}  // namespace
}  // namespace dattn
