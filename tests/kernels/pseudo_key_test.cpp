#include "kernels/pseudo_key.hpp"

#include <gtest/gtest.h>

#include "tests/kernels/problem.hpp"

namespace dattn {
namespace {

/// Pseudo-keys of one head and the counts of what they stand for.
template <class T>
struct Standing {
  Tensor<T> k, v;
  std::vector<Index> counts;

  Standing(Index number, Index d_qk, Index d_v)
      : k(random_tensor<T>(number, 1, d_qk, 7)), v(random_tensor<T>(number, 1, d_v, 8)) {
    for (Index i = 0; i < number; ++i) counts.push_back(1 + 37 * i * i);
  }
  PseudoKeys<T> pseudo() const { return {k.view(), v.view(), counts}; }
};

/// Relative error of O in the Frobenius norm and the largest error of LSE, of records that started
/// over no key, against the formula.
template <class E>
Distance from_formula(const Tensor<E>& q, const Standing<SumOf<E>>& s, const Score& score,
                      const Tensor<SumOf<E>>& records) {
  const Finished<SumOf<E>> found(records);
  Distance distance;
  double norm = 0;
  for (Index row = 0; row < q.rows; ++row) {
    for (Index h = 0; h < q.heads; ++h) {
      double total = 0;
      std::vector<double> want(static_cast<std::size_t>(s.v.dim), 0.0);
      for (std::size_t n = 0; n < s.counts.size(); ++n) {
        double dot = 0;
        for (Index i = 0; i < q.dim; ++i) {
          dot += static_cast<double>(q.view().at(row, h)[i]) *
                 static_cast<double>(s.k.view().at(static_cast<Index>(n), 0)[i]);
        }
        double x = score.scale * dot;
        if (score.soft_cap > 0) x = score.soft_cap * std::tanh(x / score.soft_cap);
        const double weight = static_cast<double>(s.counts[n]) * std::exp(x);
        total += weight;
        for (std::size_t i = 0; i < want.size(); ++i) {
          want[i] += weight * static_cast<double>(s.v.view().at(static_cast<Index>(n), 0)[i]);
        }
      }
      for (std::size_t i = 0; i < want.size(); ++i) {
        const double right = want[i] / total;
        const double got = static_cast<double>(found.o.view().at(row, h)[i]);
        distance.o += (got - right) * (got - right);
        norm += right * right;
      }
      distance.lse =
          std::max(distance.lse,
                   std::abs(static_cast<double>(found.lse.view().at(row, h)[0]) - std::log(total)));
    }
  }
  distance.o = std::sqrt(distance.o / norm);
  return distance;
}

template <class E>
void follows_the_formula(double bound_o, double bound_lse) {
  for (const Index number : {1, 2, 9}) {
    for (const double cap : {0.0, 1.5}) {
      const Score score{.scale = 0.25, .soft_cap = cap};
      const auto q = random_tensor<E>(13, 3, 16, 1);
      const Standing<SumOf<E>> s(number, 16, 5);
      Tensor<SumOf<E>> out(13, 3, 7);
      clear(out.view());
      attend_pseudo_keys(std::as_const(q).view(), s.pseudo(), out.view(), score, 2);
      const Distance found = from_formula(q, s, score, out);
      EXPECT_LE(found.o, bound_o) << number << " pseudo-keys, cap " << cap;
      EXPECT_LE(found.lse, bound_lse) << number << " pseudo-keys, cap " << cap;
    }
  }
}

TEST(PseudoKeys, FollowTheFormula) {
  follows_the_formula<float>(1e-7, 1e-6);
  follows_the_formula<double>(1e-15, 1e-14);
  follows_the_formula<BFloat16>(1e-7, 1e-6);  // rounding is Q's alone
}

TEST(PseudoKeys, OneKeyAndTheKeyItselfAreTheSame) {
  const Shape shape{11, 8, 2, 1, 1, 16, 5};
  const auto whole = random_problem<double>(shape, "full");
  const auto want = attend_whole(whole, {.threads = 1});
  // Of keys 3 and 6 pseudo-keys, of the others attention.
  auto found = empty_partial<double>(everything(shape));
  for (const dattn::Run keys : Runs{{0, 3, 1}, {4, 2, 1}, {7, 1, 1}}) {
    attend_block(whole, block(shape, {0, 2}, {{-3, 11, 1}}, {keys}), {.score = whole.score}, found);
  }
  const std::vector<Index> one{1};
  for (const Index key : {3, 6}) {
    const auto k = cut(whole.k, {{key, 1, 1}}, {0, 1}, 0);
    const auto v = cut(whole.v, {{key, 1, 1}}, {0, 1}, 0);
    attend_pseudo_keys(whole.q.view(), PseudoKeys<double>{k.view(), v.view(), one}, found.view(),
                       whole.score, 1);
  }
  const Finished<double> left(found);
  const Finished<double> right(want);
  for (std::size_t i = 0; i < left.o.numbers.size(); ++i) {
    EXPECT_NEAR(left.o.numbers[i], right.o.numbers[i], 1e-14);
  }
  for (std::size_t i = 0; i < left.lse.numbers.size(); ++i) {
    EXPECT_NEAR(left.lse.numbers[i], right.lse.numbers[i], 1e-14);
  }
}

TEST(PseudoKeys, AsManyEqualKeysAreTheSame) {
  Problem<float> many = random_problem<float>({5, 40, 2, 1, 1, 8, 3}, "full");
  for (Index j = 1; j < 40; ++j) {
    std::copy_n(many.k.view().at(0, 0), 8, many.k.view().at(j, 0));
    std::copy_n(many.v.view().at(0, 0), 3, many.v.view().at(j, 0));
  }
  const Finished<float> right(attend_whole(many, {.threads = 1}));
  auto found = empty_partial<float>(everything(many.shape));
  const std::vector<Index> forty{40};
  const PseudoKeys<float> one{{many.k.view().data, 1, 1, 8}, {many.v.view().data, 1, 1, 3}, forty};
  attend_pseudo_keys(std::as_const(many.q).view(), one, found.view(), many.score, 1);
  const Finished<float> left(found);
  for (std::size_t i = 0; i < left.o.numbers.size(); ++i) {
    EXPECT_NEAR(left.o.numbers[i], right.o.numbers[i], 1e-6);
  }
  for (std::size_t i = 0; i < left.lse.numbers.size(); ++i) {
    EXPECT_NEAR(left.lse.numbers[i], right.lse.numbers[i], 1e-6);
  }
}

TEST(PseudoKeys, BitsDoNotDependOnThreadsAndNoneChangesNothing) {
  const auto q = random_tensor<float>(29, 4, 16, 1);
  const Standing<float> s(3, 16, 5);
  Tensor<float> one = random_tensor<float>(29, 4, 7, 2);
  for (Index i = 0; i < 29 * 4; ++i) one.numbers[static_cast<std::size_t>(7 * i + 1)] = 1;
  Tensor<float> three = one;
  const Tensor<float> before = one;
  attend_pseudo_keys(q.view(), PseudoKeys<float>{{nullptr, 0, 1, 16}, {nullptr, 0, 1, 5}, {}},
                     one.view(), {}, 1);
  EXPECT_EQ(one.numbers, before.numbers);
  attend_pseudo_keys(q.view(), s.pseudo(), one.view(), {.scale = 0.3}, 1);
  attend_pseudo_keys(q.view(), s.pseudo(), three.view(), {.scale = 0.3}, 3);
  EXPECT_EQ(one.numbers, three.numbers);
  EXPECT_NE(one.numbers, before.numbers);
}

TEST(PseudoKeys, ScoresOfMinusInfinityWeighNothing) {
  const Tensor<float> q(2, 1, 2, std::numeric_limits<float>::infinity());
  const Tensor<float> k(1, 1, 2, -1.0F);
  const Tensor<float> v(1, 1, 3, 5.0F);
  Tensor<float> out(2, 1, 5);
  clear(out.view());
  const std::vector<Index> nine{9};
  attend_pseudo_keys(q.view(), PseudoKeys<float>{k.view(), v.view(), nine}, out.view(), {}, 1);
  const Finished<float> found(out);
  for (const float x : found.o.numbers) EXPECT_EQ(x, 0);
  for (const float x : found.lse.numbers) EXPECT_EQ(x, -std::numeric_limits<float>::infinity());
}

TEST(AddRows, AddsTheRowsOfTheirHeads) {
  const auto k = random_tensor<BFloat16>(20, 3, 4, 5);
  std::vector<double> sums(16);
  for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = static_cast<double>(i);
  const std::vector<Index> heads{2, 0, 2};  // two sums may be of one head
  add_rows(std::as_const(k).view(), heads, {{2, 5}, {19, 20}}, sums.data(), 6);
  for (Index i = 0; i < 16; ++i) {
    double want = static_cast<double>(i);
    for (const Index row : {2, 3, 4, 19}) {
      const Index head = heads[static_cast<std::size_t>(i / 6)];
      if (i % 6 < 4) want += static_cast<double>(k.view().at(row, head)[i % 6]);
    }
    EXPECT_DOUBLE_EQ(sums[static_cast<std::size_t>(i)], want);
  }
}

}  // namespace
}  // namespace dattn
