#include "kernels/partial.hpp"

#include <gmock/gmock.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "kernels/mask.hpp"

namespace dattn {
namespace {

template <class T>
class Partials : public testing::Test {
 protected:
  static constexpr T kInf = std::numeric_limits<T>::infinity();
  using Record = std::vector<T>;  // m, l, a

  Record none() { return {-kInf, 0, 0, 0, 0}; }

  /// The record of a few keys: scores around `centre`, values N(0, 1).
  Record random_record(double centre) {
    std::normal_distribution<double> normal;
    Record r{static_cast<T>(centre + normal(random_)), 0, 0, 0, 0};
    for (int key = 0; key < 5; ++key) {
      const T p = key == 0 ? T{1} : static_cast<T>(std::exp(-std::abs(normal(random_))));
      r[1] += p;
      for (std::size_t i = 2; i < 5; ++i) r[i] += p * static_cast<T>(normal(random_));
    }
    return r;
  }

  Record merged(const Record& from, Record into) {
    merge(from.data(), into.data(), 1, 5);
    return into;
  }

  bool same_bits(const Record& a, const Record& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
  }

  /// O and LSE.
  std::vector<T> finished(const Record& r) {
    std::vector<T> o(3, T{-7});
    std::vector<T> lse(1, T{-7});
    finish(View<const T>{r.data(), 1, 1, 5}, std::span<T>(o), std::span<T>(lse));
    o.push_back(lse[0]);
    return o;
  }

  std::mt19937 random_{5};
};

using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Partials, Types);

TYPED_TEST(Partials, OfSigmoidAttentionAreNotDivided) {
  using T = TypeParam;
  const auto finished = [](std::vector<T> record) {
    std::vector<T> o(3, T{-7});
    std::vector<T> lse(1, T{-7});
    finish(View<const T>{record.data(), 1, 1, 5}, std::span<T>(o), std::span<T>(lse), 1, true);
    o.push_back(lse[0]);
    return o;
  };
  const T two = std::log(T{2});
  EXPECT_EQ(finished({0, 2, 6, -3, 0}), (std::vector<T>{6, -3, 0, two}));
  const auto scaled = finished({two, 1, 3, -1.5, 0});  // the same, as a merge may leave it
  EXPECT_NEAR(scaled[0], 6, 1e-6);
  EXPECT_NEAR(scaled[3], two, 1e-6);
  const T none = -std::numeric_limits<T>::infinity();
  EXPECT_EQ(finished({none, 0, 9, 9, 9}), (std::vector<T>{0, 0, 0, none}));
}

TYPED_TEST(Partials, TheRecordOfNoKeyChangesNothingOnEitherSide) {
  for (const double centre : {0.0, 1e30, -1e30, 88.0, -700.0}) {
    const auto r = this->random_record(centre);
    EXPECT_TRUE(this->same_bits(this->merged(r, this->none()), r));
    EXPECT_TRUE(this->same_bits(this->merged(this->none(), r), r));
  }
  const std::vector<TypeParam> zeros{-0.0f, 1, -0.0f, 0, -1};
  EXPECT_TRUE(this->same_bits(this->merged(zeros, this->none()), zeros));
  EXPECT_TRUE(this->same_bits(this->merged(this->none(), zeros), zeros));
}

TYPED_TEST(Partials, NoKeyMergedWithNoKeyIsNoKey) {
  EXPECT_TRUE(this->same_bits(this->merged(this->none(), this->none()), this->none()));
}

TYPED_TEST(Partials, MergeCommutesToTheBit) {
  for (int round = 0; round < 2000; ++round) {
    const auto a = this->random_record(0);
    const auto b = this->random_record(round % 7);
    ASSERT_TRUE(this->same_bits(this->merged(a, b), this->merged(b, a)));
  }
  const std::vector<TypeParam> zero{0, 1, -0.0f, 0, 3};
  const std::vector<TypeParam> minus{-0.0f, 2, 0, -0.0f, 1};
  EXPECT_TRUE(this->same_bits(this->merged(zero, minus), this->merged(minus, zero)));
}

TYPED_TEST(Partials, MergeAssociatesToRounding) {
  const double bound = 8 * static_cast<double>(std::numeric_limits<TypeParam>::epsilon());
  for (int round = 0; round < 500; ++round) {
    const auto a = this->random_record(0);
    const auto b = this->random_record(round % 5);
    const auto c = this->random_record(-(round % 3));
    const auto left = this->finished(this->merged(this->merged(a, b), c));
    const auto right = this->finished(this->merged(a, this->merged(b, c)));
    for (std::size_t i = 0; i < left.size(); ++i) {
      ASSERT_NEAR(left[i], right[i], bound * (1 + std::abs(static_cast<double>(left[i]))));
    }
  }
}

TYPED_TEST(Partials, MergeOfTwoKeysIsTheirSoftmax) {
  const std::vector<TypeParam> a{2, 1, 10, 0, 0};
  const std::vector<TypeParam> b{1, 1, 0, 20, 0};
  const auto out = this->finished(this->merged(a, b));
  const double first = 1 / (1 + std::exp(-1.0));
  const double bound = 64 * static_cast<double>(std::numeric_limits<TypeParam>::epsilon());
  EXPECT_NEAR(out[0], 10 * first, bound);
  EXPECT_NEAR(out[1], 20 * (1 - first), bound);
  EXPECT_EQ(out[2], 0);
  EXPECT_NEAR(out[3], 2 + std::log1p(std::exp(-1.0)), bound);
}

TYPED_TEST(Partials, FarScoresWeighNothingAndMakeNoNaN) {
  constexpr auto kMost = std::numeric_limits<TypeParam>::max();
  for (const TypeParam top : {TypeParam{1e30f}, kMost, TypeParam{0}}) {
    const std::vector<TypeParam> high{top, 2, 2, 4, 6};
    for (const TypeParam bottom : {TypeParam{-1e30f}, -kMost}) {
      const std::vector<TypeParam> low{bottom, 3, 30, 60, 90};
      EXPECT_TRUE(this->same_bits(this->merged(high, low), high));
      EXPECT_TRUE(this->same_bits(this->merged(low, high), high));
    }
    EXPECT_EQ(this->finished(this->merged(high, high))[1], 2);
  }
}

TYPED_TEST(Partials, NaNScoresAreNotTakenForNoKey) {
  const TypeParam nan = std::numeric_limits<TypeParam>::quiet_NaN();
  const std::vector<TypeParam> bad{-this->kInf, nan, nan, nan, nan};
  for (const auto& other : {this->none(), this->random_record(0), bad}) {
    for (const auto& out : {this->merged(bad, other), this->merged(other, bad)}) {
      for (const TypeParam x : this->finished(out)) EXPECT_TRUE(std::isnan(x));
    }
  }
}

TYPED_TEST(Partials, RowsWithoutKeysFinishAsZero) {
  EXPECT_THAT(this->finished(this->none()), testing::ElementsAre(0, 0, 0, -this->kInf));
  EXPECT_THAT(this->finished({3, 2, 2, 4, 8}),
              testing::ElementsAre(1, 2, 4, static_cast<TypeParam>(3 + std::log(2.0))));
}

TYPED_TEST(Partials, ClearMakesRecordsOfNoKeyAndMergeTakesMany) {
  std::vector<TypeParam> many(3 * 2 * 5, TypeParam{9});
  clear(View<TypeParam>{many.data(), 3, 2, 5});
  const std::vector<TypeParam> empty = many;
  std::vector<TypeParam> other;
  for (int i = 0; i < 6; ++i) {
    const auto none = this->none();
    EXPECT_TRUE(std::equal(none.begin(), none.end(), many.begin() + 5 * i));
    const auto r = i == 3 ? none : this->random_record(i);
    other.insert(other.end(), r.begin(), r.end());
  }
  merge(other.data(), many.data(), 6, 5);
  EXPECT_TRUE(this->same_bits(many, other));
  merge(empty.data(), many.data(), 6, 5);
  EXPECT_TRUE(this->same_bits(many, other));
}

TYPED_TEST(Partials, NothingLooksAtTheSumsOfNoKey) {
  std::vector<TypeParam> none(5, std::numeric_limits<TypeParam>::quiet_NaN());
  start(View<TypeParam>{none.data(), 1, 1, 5});
  EXPECT_THAT(this->finished(none), testing::ElementsAre(0, 0, 0, -this->kInf));
  const auto record = this->random_record(3);
  EXPECT_TRUE(this->same_bits(this->merged(none, record), record));
  EXPECT_TRUE(this->same_bits(this->merged(record, none), record));
  EXPECT_THAT(this->finished(this->merged(none, none)), testing::ElementsAre(0, 0, 0, -this->kInf));
}

TYPED_TEST(Partials, ThreadsChangeNoBit) {
  constexpr Index kRows = 70001;  // records of more than a MiB, which no number of threads divides
  constexpr Index kSize = kRows * 5;
  std::vector<TypeParam> a, b;
  for (Index i = 0; i < kRows; ++i) {
    const auto x = i % 7 == 3 ? this->none() : this->random_record(static_cast<double>(i % 50));
    const auto y = i % 5 == 2 ? this->none() : this->random_record(static_cast<double>(i % 40));
    a.insert(a.end(), x.begin(), x.end());
    b.insert(b.end(), y.begin(), y.end());
  }
  const auto all = [&](int threads) {
    std::vector<TypeParam> cleared(kSize, TypeParam{9});
    clear(View<TypeParam>{cleared.data(), kRows, 1, 5}, threads);
    std::vector<TypeParam> sum = b;
    merge(a.data(), sum.data(), kRows, 5, threads);
    std::vector<TypeParam> o(3 * kRows, TypeParam{-7});
    std::vector<TypeParam> lse(kRows, TypeParam{-7});
    finish(View<const TypeParam>{sum.data(), kRows, 1, 5}, std::span<TypeParam>(o),
           std::span<TypeParam>(lse), threads);
    for (const auto* part : {&cleared, &o, &lse}) sum.insert(sum.end(), part->begin(), part->end());
    return sum;
  };
  const auto one = all(1);
  for (const int threads : {2, 3, 8}) EXPECT_TRUE(this->same_bits(one, all(threads))) << threads;
}

}  // namespace
}  // namespace dattn
