// GQA weights to MLA weights, step by step, against the double reference of the GQA layer.
#include "kernels/latent/convert.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>

#include "tests/kernels/latent.hpp"

namespace dattn {
namespace {

constexpr double kExact = 1e-5;

Tensor<float> tokens_of(const GqaSizes& sizes, Index tokens, unsigned seed) {
  return random_tensor<float>(tokens, 1, sizes.model, seed);
}

/// MQA, GQA, MHA; both kinds of pairs; a head of one pair.
const std::vector<GqaSizes>& cases() {
  static const std::vector<GqaSizes> table{
      {.model = 11, .heads = 1, .kv_heads = 1, .dim = 2},
      {.model = 24, .heads = 5, .kv_heads = 1, .dim = 8, .pairs = RopePairs::neighbours},
      {.model = 40, .heads = 6, .kv_heads = 3, .dim = 8, .rope_base = 500},
      {.model = 37, .heads = 4, .kv_heads = 4, .dim = 6, .pairs = RopePairs::neighbours},
      {.model = 64, .heads = 8, .kv_heads = 2, .dim = 16, .rope_base = 1e6},
  };
  return table;
}

/// As if its key heads were one: heads j read factor_j times the keys and values of head 0.
GqaWeights of_one_head(const GqaSizes& sizes) {
  GqaWeights w = random_weights(sizes, 3);
  for (std::vector<float>* m : {&w.k, &w.v}) {
    for (Index row = 0; row < sizes.model; ++row) {
      const auto first = m->begin() + row * sizes.kv_heads * sizes.dim;
      for (Index j = 1; j < sizes.kv_heads; ++j) {
        for (Index d = 0; d < sizes.dim; ++d) {
          first[j * sizes.dim + d] = first[d] * (static_cast<float>(j) - 2.5F);
        }
      }
    }
  }
  return w;
}

Conversion merged(const GqaSizes& s) {
  return {.kv_rank = s.kv_heads * s.dim, .d_rope = s.kv_heads * s.dim, .fold = 1};
}

TEST(GqaTest, PairsInEitherOrderAreTheSameLayer) {
  const GqaSizes sizes{.model = 24, .heads = 4, .kv_heads = 2, .dim = 10};
  const GqaWeights w = random_weights(sizes, 1);
  const Tensor<float> x = tokens_of(sizes, 19, 5);
  const auto y = gqa_reference(w, x.view(), 19);
  EXPECT_LE(relative_error(gqa_reference(with_neighbours(w), x.view(), 19), y), 1e-13);
  GqaWeights mistaken = w;
  mistaken.sizes.pairs = RopePairs::neighbours;
  EXPECT_GE(relative_error(gqa_reference(mistaken, x.view(), 19), y), 1e-2);
}

TEST(ConvertTest, MergedAndConcentratedKeysAreTheSameLayer) {
  for (const GqaSizes& s : cases()) {
    const GqaWeights w = random_weights(s, 1);
    const Tensor<float> x = tokens_of(s, 29, 5);
    const Tensor<float> calibration = tokens_of(s, 50, 6);
    const auto y = gqa_reference(w, x.view(), 7);
    EXPECT_LE(relative_error(merged_reference(w, merged_keys(s), x.view(), 7), y), 1e-12);
    const MergedKeys keys = concentrated_keys(w, calibration.view(), 1);
    EXPECT_LE(relative_error(merged_reference(w, keys, x.view(), 7), y), 1e-12);
    // Another matrix for the imaginary parts would not commute; nor do folded frequencies.
    if (s.dim < 4) continue;
    const MergedKeys folded = concentrated_keys(w, calibration.view(), s.dim / 2);
    EXPECT_GE(relative_error(merged_reference(w, folded, x.view(), 7), y), 1e-4);
  }
}

TEST(ConvertTest, ConcentratedKeysHoldMostInTheFirstComponents) {
  const GqaSizes s{.model = 40, .heads = 6, .kv_heads = 3, .dim = 8};
  const GqaWeights w = of_one_head(s);
  const MergedKeys keys = concentrated_keys(w, tokens_of(s, 50, 6).view(), 1);
  // Of one head: component 0 is all there is, and it is along the factors of the heads.
  const double norm = std::sqrt(1 + 1.5 * 1.5 + 0.5 * 0.5);
  for (Index g = 0; g < 4; ++g) {
    const double* u = keys.u.data() + g * 9;
    EXPECT_NEAR(std::abs(u[0]), 1 / norm, 1e-6);
    EXPECT_NEAR(std::abs(u[3]), 1.5 / norm, 1e-6);
    EXPECT_NEAR(std::abs(u[6]), 0.5 / norm, 1e-6);
  }
}

TEST(ConvertTest, EverythingTurningIsExact) {
  for (const GqaSizes& s : cases()) {
    const GqaWeights w = random_weights(s, 1);
    const Tensor<float> x = tokens_of(s, 29, 5);
    const Tensor<float> calibration = tokens_of(s, 90, 6);
    const LatentWeights latent = converted(w, merged(s), calibration.view());
    EXPECT_EQ(latent.sizes.rope.copies, s.kv_heads);
    const auto y = gqa_reference(w, x.view(), 7);
    EXPECT_LE(relative_error(latent_reference(latent, x.view(), 7), y), kExact);
    // The forms that are run, with an RMSNorm that does nothing.
    const Range heads{0, s.heads};
    EXPECT_LE(relative_error(absorbed_layer<float>(latent, heads, x.view(), 7, {}).numbers, y),
              kExact);
    EXPECT_LE(relative_error(expanded_layer<float>(latent, heads, x.view(), 7, {}).numbers, y),
              kExact);
    EXPECT_LE(relative_error(absorbed_layer<BFloat16>(latent, heads, x.view(), 7, {}).numbers, y),
              2e-2);
  }
}

TEST(ConvertTest, HeadsThatAreOneAreExactWithEachFrequencyOnce) {
  for (GqaSizes s : cases()) {
    const GqaWeights w = of_one_head(s);
    const Tensor<float> x = tokens_of(s, 29, 5);
    const Tensor<float> calibration = tokens_of(s, 90, 6);
    const Conversion one{.kv_rank = s.dim, .d_rope = s.dim, .fold = 1};
    const LatentWeights latent = converted(w, one, calibration.view());
    EXPECT_EQ(latent.sizes.rope.copies, 1);
    EXPECT_LE(relative_error(latent_reference(latent, x.view(), 7), gqa_reference(w, x.view(), 7)),
              kExact);
  }
}

TEST(ConvertTest, AllOfTheLatentIsTheCutLayer) {
  // Steps 4 and 5 cut nothing if the latent holds all that stands: with each fold, d_rope and
  // balance the result is the layer that step 3 left.
  struct Cut {
    GqaSizes sizes;
    Conversion conversion;
  };
  const GqaSizes& gqa = cases()[2];
  const GqaSizes& wide = cases()[4];
  for (const Cut& cut : {Cut{gqa, {.kv_rank = 40, .d_rope = 8}},
                         Cut{gqa, {.kv_rank = 44, .d_rope = 4, .fold = 4, .balance = 0.3}},
                         Cut{gqa, {.kv_rank = 46, .d_rope = 2}},
                         Cut{gqa, {.kv_rank = 32, .d_rope = 16, .fold = 2, .balance = 7}},
                         Cut{wide, {.kv_rank = 60, .d_rope = 4, .fold = 8}},
                         Cut{wide, {.kv_rank = 56, .d_rope = 8, .fold = 2}}}) {
    const GqaSizes& s = cut.sizes;
    ASSERT_EQ(complaint(s, cut.conversion).value_or(""), "");
    const GqaWeights w = random_weights(s, 2);
    const Tensor<float> x = tokens_of(s, 29, 5);
    const Tensor<float> calibration = tokens_of(s, 120, 6);
    const MergedKeys keys = cut_keys(
        s, concentrated_keys(w, calibration.view(), fold_of(s, cut.conversion)), cut.conversion);
    const auto y = merged_reference(w, keys, x.view(), 9);
    const LatentWeights latent = absorbed_weights(w, keys, cut.conversion, calibration.view());
    EXPECT_LE(relative_error(latent_reference(latent, x.view(), 9), y), kExact);
    EXPECT_GE(relative_error(y, gqa_reference(w, x.view(), 9)), 1e-3);  // the cut itself is none
    // A latent that is too small loses some, and more if smaller.
    double before = kExact;
    for (const Index rank : {cut.conversion.kv_rank * 3 / 4, cut.conversion.kv_rank / 2}) {
      Conversion small = cut.conversion;
      small.kv_rank = rank;
      const LatentWeights less = absorbed_weights(w, keys, small, calibration.view());
      const double error = relative_error(latent_reference(less, x.view(), 9), y);
      EXPECT_GT(error, before);
      EXPECT_LT(error, 1);
      before = error;
    }
  }
}

TEST(ConvertTest, FrequenciesThatAreAlikeFoldAlmostExactly) {
  // With a base near 1 all pairs turn alike and folding them loses little; with the usual one it
  // loses much.
  const auto loss = [](double base) {
    const GqaSizes s{.model = 40, .heads = 4, .kv_heads = 2, .dim = 8, .rope_base = base};
    const GqaWeights w = random_weights(s, 2);
    const Tensor<float> x = tokens_of(s, 6, 5);
    const MergedKeys keys = concentrated_keys(w, tokens_of(s, 99, 6).view(), 2);
    return relative_error(merged_reference(w, keys, x.view(), 6), gqa_reference(w, x.view(), 6));
  };
  EXPECT_LT(loss(1.0001), 1e-3);
  EXPECT_GT(loss(10000), 1e-2);
}

TEST(ConvertTest, SameBitsAgain) {
  const GqaSizes& s = cases()[4];
  const GqaWeights w = random_weights(s, 2);
  const Tensor<float> x = tokens_of(s, 70, 6);
  const Conversion conversion{.kv_rank = 24, .d_rope = 8};
  const LatentWeights a = converted(w, conversion, x.view());
  const LatentWeights b = converted(w, conversion, x.view());
  EXPECT_EQ(a.up_q, b.up_q);
  EXPECT_EQ(a.down_kv, b.down_kv);
  EXPECT_EQ(a.up_k, b.up_k);
  EXPECT_EQ(a.up_v, b.up_v);
}

TEST(ConvertTest, ComplaintsNameTheSizeAndTheFix) {
  const GqaSizes s{.model = 40, .heads = 6, .kv_heads = 3, .dim = 16};
  const auto of = [&](Conversion c) { return complaint(s, c).value_or(""); };
  using testing::HasSubstr;
  EXPECT_EQ(of({.kv_rank = 80, .d_rope = 16}), "");
  EXPECT_THAT(of({.kv_rank = 81, .d_rope = 16}), HasSubstr("kv rank is 81; want 1 to 80"));
  EXPECT_THAT(of({.kv_rank = 0, .d_rope = 16}), HasSubstr("kv rank is 0"));
  EXPECT_THAT(of({.kv_rank = 8, .d_rope = 6}), HasSubstr("d_rope is 6"));
  EXPECT_THAT(of({.kv_rank = 8, .d_rope = 64}), HasSubstr("d_rope is 64"));
  EXPECT_THAT(of({.kv_rank = 8, .d_rope = 8, .fold = 1}), HasSubstr("fold of frequencies is 1"));
  EXPECT_THAT(of({.kv_rank = 8, .d_rope = 8, .fold = 3}), HasSubstr("fold of frequencies is 3"));
  EXPECT_THAT(of({.kv_rank = 8, .d_rope = 8, .balance = 0}), HasSubstr("balance"));
  EXPECT_THAT(complaint(GqaSizes{.model = 4, .heads = 4, .kv_heads = 3}).value_or(""),
              HasSubstr("no multiple of 3"));
  EXPECT_THAT(complaint(GqaSizes{.model = 4, .dim = 3}).value_or(""), HasSubstr("dim is 3"));
  EXPECT_THAT(complaint(GqaSizes{.model = 0}).value_or(""), HasSubstr("model is 0"));
  EXPECT_THAT(complaint(GqaSizes{.model = 4, .rope_base = 1}).value_or(""), HasSubstr("base"));
}

TEST(GroupedTest, HeadsThatAreOneAreExact) {
  for (const GqaSizes& s : cases()) {
    const GqaWeights w = of_one_head(s);
    const Tensor<float> x = tokens_of(s, 29, 5);
    const GqaWeights less = grouped(w, 1, tokens_of(s, 90, 6).view());
    EXPECT_EQ(less.sizes.kv_heads, 1);
    EXPECT_LE(relative_error(gqa_reference(less, x.view(), 7), gqa_reference(w, x.view(), 7)),
              kExact);
  }
}

TEST(GroupedTest, FewerHeadsLoseMoreAndAllOfThemNothing) {
  // Heads that differ a little, four of them; two groups, then one.
  const GqaSizes s{.model = 40, .heads = 8, .kv_heads = 4, .dim = 8};
  GqaWeights w = of_one_head(s);
  const GqaWeights other = random_weights(s, 9);
  for (std::size_t i = 0; i < w.k.size(); ++i) {
    w.k[i] += 0.2F * other.k[i];
    w.v[i] += 0.2F * other.v[i];
  }
  const Tensor<float> x = tokens_of(s, 29, 5);
  const Tensor<float> calibration = tokens_of(s, 200, 6);
  const auto y = gqa_reference(w, x.view(), 29);
  const auto loss = [&](Index kv_heads) {
    return relative_error(gqa_reference(grouped(w, kv_heads, calibration.view()), x.view(), 29), y);
  };
  EXPECT_LE(loss(4), kExact);
  EXPECT_GT(loss(2), 1e-3);
  EXPECT_LT(loss(2), 0.5);
  EXPECT_GT(loss(1), loss(2));
}

TEST(ConvertTest, NumbersThatAreNotFiniteAreRefused) {
  const GqaSizes& s = cases()[2];
  const GqaWeights w = random_weights(s, 2);
  const Conversion conversion{.kv_rank = 8, .d_rope = 8};
  Tensor<float> x = tokens_of(s, 9, 6);
  EXPECT_THROW(converted(w, conversion, tokens_of(s, 0, 6).view()), std::invalid_argument);
  x.numbers[7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(converted(w, conversion, x.view()), std::invalid_argument);
  GqaWeights broken = w;
  broken.v[3] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(converted(broken, conversion, tokens_of(s, 9, 6).view()), std::invalid_argument);
}

}  // namespace
}  // namespace dattn
