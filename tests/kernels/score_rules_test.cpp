// Score rules, normalisers and bfloat16 against the reference in double, for every instruction set.
#include <gmock/gmock.h>

#include "tests/kernels/variants.hpp"

namespace dattn {
namespace {

class Rules : public testing::TestWithParam<const Isa*> {
 protected:
  template <class T>
  void check(double bound_o, double bound_lse) const {
    for (const auto& [c, variant] : shapes_and_variants()) {
      SCOPED_TRACE(name_of(c) + ", " + variant.name);
      auto problem = random_problem<T>(c.shape, c.mask);
      apply(variant, problem);
      const auto one = attend_whole(problem, {.isa = GetParam()});
      const Distance d = distance(problem, everything(c.shape), one);
      EXPECT_LE(d.o, bound_o);
      EXPECT_LE(d.lse, bound_lse);
      EXPECT_EQ(attend_whole(problem, {.threads = 3, .isa = GetParam()}).numbers, one.numbers);
    }
  }
};

TEST_P(Rules, MatchTheReferenceInFloat32) { check<float>(1e-6, 2e-6); }

// Inputs are rounded before both; weights are rounded to bfloat16 where tiles compute.
TEST_P(Rules, MatchTheReferenceInBFloat16) { check<BFloat16>(4e-3, 4e-3); }

INSTANTIATE_TEST_SUITE_P(Isa, Rules,
                         testing::ValuesIn(available_isas().begin(), available_isas().end()),
                         [](const auto& one) { return std::string(one.param->name); });

TEST(Rules, MatchTheReferenceInDouble) {
  for (const auto& [c, variant] : shapes_and_variants()) {
    SCOPED_TRACE(name_of(c) + ", " + variant.name);
    auto problem = random_problem<double>(c.shape, c.mask);
    apply(variant, problem);
    const Distance d = distance(problem, everything(c.shape), attend_whole(problem, {}));
    EXPECT_LE(d.o, 1e-14);
    EXPECT_LE(d.lse, 1e-13);
  }
}

/// A key of log-weight ln n counts as n keys like it.
TEST(KeyWeights, StandForRepeatedKeys) {
  const Shape shape{20, 5, 2, 1, 1, 16, 16};
  auto few = random_problem<float>(shape, "full");
  Shape longer = shape;
  longer.keys = 9;
  auto many = random_problem<float>(longer, "full");
  many.q = few.q;
  const std::vector<Index> copies{1, 3, 1, 2, 2};
  Index to = 0;
  for (Index k = 0; k < 5; ++k) {
    const Index n = copies[static_cast<std::size_t>(k)];
    few.key_weights.push_back(std::log(static_cast<float>(n)));
    for (Index i = 0; i < n; ++i, ++to) {
      std::copy_n(few.k.view().at(k, 0), 16, many.k.view().at(to, 0));
      std::copy_n(few.v.view().at(k, 0), 16, many.v.view().at(to, 0));
    }
  }
  const Finished<float> a(attend_whole(few, {}));
  const Finished<float> b(attend_whole(many, {}));
  for (std::size_t i = 0; i < a.o.numbers.size(); ++i) {
    EXPECT_NEAR(a.o.numbers[i], b.o.numbers[i], 1e-6);
  }
  for (std::size_t i = 0; i < a.lse.numbers.size(); ++i) {
    EXPECT_NEAR(a.lse.numbers[i], b.lse.numbers[i], 2e-6);
  }
}

/// A sink of logit s counts as a key of score s whose value is 0.
TEST(SinkLogit, IsAKeyWithoutValue) {
  const Shape shape{7, 50, 2, 1, 1, 16, 16};
  const auto problem = random_problem<float>(shape, "causal");
  auto partial = attend_whole(problem, {});
  const Finished<float> before(partial);
  const std::vector<float> logits{0.5f, -1.0f};
  add_sink<float>(partial.view(), logits);
  const Finished<float> after(partial);
  for (Index row = 0; row < 7; ++row) {
    for (Index h = 0; h < 2; ++h) {
      const double lse = *before.lse.view().at(row, h);
      const double sink = logits[static_cast<std::size_t>(h)];
      const double with = std::log(std::exp(lse) + std::exp(sink));
      EXPECT_NEAR(*after.lse.view().at(row, h), with, 2e-6);
      for (Index i = 0; i < 16; ++i) {
        EXPECT_NEAR(after.o.view().at(row, h)[i],
                    before.o.view().at(row, h)[i] * std::exp(lse - with), 1e-6);
      }
    }
  }
}

}  // namespace
}  // namespace dattn
