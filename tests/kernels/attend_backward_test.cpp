// Gradients against the reference in double, against finite differences of that reference, and
// against what is known without any attention code.
#include "kernels/attend_backward.hpp"

#include <gmock/gmock.h>

#include "tests/kernels/variants.hpp"

namespace dattn {
namespace {

template <class T>
struct Gradients {
  Gradients(const Shape& s, Sum<T> value = 0)
      : dq(s.queries, s.query_heads, s.d_qk, value),
        dk(s.keys, s.key_heads, s.d_qk, value),
        dv(s.keys, s.value_heads, s.d_v, value) {}
  Tensor<Sum<T>> dq, dk, dv;
};

/// LSE and delta of the whole problem, from the forward pass.
template <class T>
struct Saved {
  Saved(const Problem<T>& problem, const Tensor<T>& d_o, const Work& work)
      : lse(problem.shape.queries, problem.shape.query_heads, 1), delta(lse) {
    const Finished<Sum<T>> forward(attend_whole(problem, work));
    lse = forward.lse;
    delta_of(std::as_const(forward.o).view(), d_o.view(), delta.view());
  }
  /// For those who do not look at numbers.
  explicit Saved(const Shape& shape)
      : lse(shape.queries, shape.query_heads, 1, Sum<T>{9}), delta(lse) {}
  Tensor<Sum<T>> lse, delta;
};

template <class T>
Tensor<T> random_cotangent(const Shape& s) {
  return random_tensor<T>(s.queries, s.query_heads, s.d_v, 4);
}

/// Adds the gradients of the key rows `keys` for all queries.
template <class T>
void backward_keys(const Problem<T>& problem, const Tensor<T>& d_o, const Saved<T>& saved,
                   const Runs& keys, Work work, Gradients<T>& out) {
  work.score = problem.score;
  Where where = everything(problem.shape);
  where.keys = keys;
  const auto k = cut(problem.k, keys, where.key_heads, 0);
  const auto v = cut(problem.v, keys, where.value_heads, 0);
  Tensor<float> weights(size(keys), problem.shape.key_heads, 1);
  Tensor<Sum<T>> dk(k.rows, k.heads, k.dim);
  Tensor<Sum<T>> dv(v.rows, v.heads, v.dim);
  if (!problem.key_weights.empty()) {
    Tensor<float> all(problem.shape.keys, problem.shape.key_heads, 1);
    all.numbers = problem.key_weights;
    weights = cut(all, keys, where.key_heads, 0);
    where.key_weights = std::as_const(weights).view();
  }
  attend_backward(problem.q.view(), k.view(), v.view(), d_o.view(), saved.lse.view(),
                  saved.delta.view(), out.dq.view(), dk.view(), dv.view(), where, *problem.mask,
                  work);
  Index from = 0;
  for (const Run& run : keys) {
    for (Index i = 0; i < run.count; ++i, ++from) {
      for (Index h = 0; h < k.heads; ++h) {
        for (Index d = 0; d < k.dim; ++d) out.dk.at(run.at(i), h, d) += dk.at(from, h, d);
      }
      for (Index h = 0; h < v.heads; ++h) {
        for (Index d = 0; d < v.dim; ++d) out.dv.at(run.at(i), h, d) += dv.at(from, h, d);
      }
    }
  }
}

template <class T>
Gradients<T> backward_whole(const Problem<T>& problem, const Tensor<T>& d_o, const Saved<T>& saved,
                            const Work& work) {
  Gradients<T> out(problem.shape);
  backward_keys(problem, d_o, saved, {{0, problem.shape.keys, 1}}, work, out);
  return out;
}

template <class T>
double relative(const Tensor<T>& found, const std::vector<double>& right) {
  double wrong = 0;
  double norm = 0;
  for (std::size_t i = 0; i < right.size(); ++i) {
    const double e = static_cast<double>(found.numbers[i]) - right[i];
    wrong += e * e;
    norm += right[i] * right[i];
  }
  const double out = norm > 0 ? std::sqrt(wrong / norm) : std::sqrt(wrong);
  return std::isnan(out) ? std::numeric_limits<double>::infinity() : out;
}

template <class T>
void expect_near(const Gradients<T>& found, const ReferenceGradients& right, double bound) {
  EXPECT_LE(relative(found.dq, right.dq), bound) << "dq";
  EXPECT_LE(relative(found.dk, right.dk), bound) << "dk";
  EXPECT_LE(relative(found.dv, right.dv), bound) << "dv";
}

template <class T>
ReferenceGradients reference_of(const Problem<T>& p, const Tensor<T>& d_o) {
  return reference_gradients<T>(p.shape, *p.mask, p.score, p.q.view(), p.k.view(), p.v.view(),
                                d_o.view(), p.weights());
}

class Backward : public testing::TestWithParam<const Isa*> {
 protected:
  Work work(int threads = 1) const { return {.threads = threads, .isa = GetParam()}; }

  /// Within the bound of the reference, and the same bits by three threads.
  template <class T>
  void check(const Problem<T>& problem, double bound) const {
    const auto d_o = random_cotangent<T>(problem.shape);
    const Saved<T> saved(problem, d_o, work());
    const auto one = backward_whole(problem, d_o, saved, work());
    expect_near(one, reference_of(problem, d_o), bound);
    const auto three = backward_whole(problem, d_o, saved, work(3));
    EXPECT_EQ(three.dq.numbers, one.dq.numbers);
    EXPECT_EQ(three.dk.numbers, one.dk.numbers);
    EXPECT_EQ(three.dv.numbers, one.dv.numbers);
  }

  template <class T>
  void check(double bound) const {
    for (const auto& [c, variant] : shapes_and_variants()) {
      SCOPED_TRACE(name_of(c) + ", " + variant.name);
      auto problem = random_problem<T>(c.shape, c.mask);
      apply(variant, problem);
      check(problem, bound);
    }
  }
};

TEST_P(Backward, MatchesTheReferenceInFloat32) { check<float>(3e-6); }
TEST_P(Backward, MatchesTheReferenceInBFloat16) { check<BFloat16>(8e-3); }

TEST_P(Backward, AddsUpOverBlocksOfKeysInAnyPartition) {
  const Shape shape{150, 170, 4, 2, 2, 32, 24};
  for (const std::string mask :
       {"causal", "window:60,5/sink:4", "dilated:20,4,3", "s2:block=4,local=1,stride=5,step=1",
        "causal@0;dilated:20,4,3@1-2;dilated:20,4,2@3", "window:9,2/dilated:20,4,3",
        "causal@0;dilated:20,4,3/sink:5@1-2;causal@3"}) {
    const auto problem = random_problem<float>(shape, mask);
    const auto d_o = random_cotangent<float>(shape);
    const Saved<float> saved(problem, d_o, work());
    const auto right = reference_of(problem, d_o);
    const std::vector<std::vector<Runs>> partitions{
        {{{0, 61, 1}}, {{61, 0, 1}}, {{61, 109, 1}}},
        {{{0, 40, 1}, {130, 40, 1}}, {{40, 90, 1}}},
        {{{0, 57, 3}}, {{1, 57, 3}}, {{2, 56, 3}}},
    };
    for (const auto& parts : partitions) {
      Gradients<float> sum(shape);
      for (const Runs& keys : parts) backward_keys(problem, d_o, saved, keys, work(), sum);
      expect_near(sum, right, 3e-6);
    }
  }
}

TEST_P(Backward, AddsToWhatTheGradientsHeld) {
  const Shape shape{40, 50, 2, 1, 2, 16, 24};
  const auto problem = random_problem<float>(shape, "causal");
  const auto d_o = random_cotangent<float>(shape);
  const Saved<float> saved(problem, d_o, work());
  const auto zero = backward_whole(problem, d_o, saved, work());
  Gradients<float> ones(shape, 1.0f);
  Work how = work();
  how.score = problem.score;
  attend_backward(problem.q.view(), problem.k.view(), problem.v.view(), d_o.view(),
                  saved.lse.view(), saved.delta.view(), ones.dq.view(), ones.dk.view(),
                  ones.dv.view(), everything(shape), *problem.mask, how);
  for (std::size_t i = 0; i < zero.dq.numbers.size(); ++i) {
    EXPECT_NEAR(ones.dq.numbers[i], 1 + zero.dq.numbers[i], 1e-6);
  }
  for (std::size_t i = 0; i < zero.dk.numbers.size(); ++i) {
    EXPECT_NEAR(ones.dk.numbers[i], 1 + zero.dk.numbers[i], 2e-6);
  }
  for (std::size_t i = 0; i < zero.dv.numbers.size(); ++i) {
    EXPECT_NEAR(ones.dv.numbers[i], 1 + zero.dv.numbers[i], 2e-6);
  }
}

TEST_P(Backward, RowsWithoutKeysHaveNoGradientAndGiveNone) {
  const Shape shape{60, 50, 1, 1, 1, 16, 16};  // causal: rows 0..9 see nothing
  const auto problem = random_problem<float>(shape, "causal");
  const auto d_o = random_cotangent<float>(shape);
  const Saved<float> saved(problem, d_o, work());
  const auto found = backward_whole(problem, d_o, saved, work());
  for (Index row = 0; row < 10; ++row) {
    for (Index i = 0; i < 16; ++i) EXPECT_EQ(found.dq.view().at(row, 0)[i], 0);
  }
  expect_near(found, reference_of(problem, d_o), 3e-6);
}

/// One key: P = 1 whatever the score, so dV = sum of dO and nothing reaches Q and K.
TEST_P(Backward, OneKeyTakesAllOfTheCotangent) {
  const Shape shape{33, 1, 1, 1, 1, 8, 8};
  const auto problem = random_problem<float>(shape, "full");
  const auto d_o = random_cotangent<float>(shape);
  const Saved<float> saved(problem, d_o, work());
  const auto found = backward_whole(problem, d_o, saved, work());
  for (Index i = 0; i < 8; ++i) {
    double sum = 0;
    for (Index row = 0; row < 33; ++row) sum += d_o.view().at(row, 0)[i];
    EXPECT_NEAR(found.dv.view().at(0, 0)[i], sum, 1e-5);
    EXPECT_NEAR(found.dk.view().at(0, 0)[i], 0, 1e-5);
  }
  for (const float x : found.dq.numbers) EXPECT_NEAR(x, 0, 1e-5);
}

TEST_P(Backward, ExtremeScoresAndDenormalsMakeNoNaN) {
  const Shape shape{70, 80, 2, 1, 1, 16, 16};
  for (const float size : {100.0f, 1e-20f}) {
    auto problem = random_problem<float>(shape, "causal");
    for (float& x : problem.q.numbers) x *= size;
    for (float& x : problem.k.numbers) x *= size;
    const auto d_o = random_cotangent<float>(shape);
    const Saved<float> saved(problem, d_o, work());
    const auto found = backward_whole(problem, d_o, saved, work());
    for (const auto* t : {&found.dq, &found.dk, &found.dv}) {
      for (const float x : t->numbers) EXPECT_TRUE(std::isfinite(x));
    }
    // Of scores in the thousands a float keeps a few digits behind the point.
    EXPECT_LE(relative(found.dv, reference_of(problem, d_o).dv), size > 1 ? 1e-3 : 3e-6);
  }
}

TEST_P(Backward, TakesNoMoreMemoryThanItSays) {
  const ShapeMask large[] = {{{300, 2000, 2, 1, 1, 16, 16}, "causal"},  // keys in parts
                             {{300, 2000, 8, 8, 8, 64, 64}, "causal"},  // packs are most of it
                             {{6000, 800, 1, 1, 1, 32, 16}, "full"},    // sums of dQ are
                             {{100, 900, 6, 3, 2, 48, 80}, "full"}};
  const auto check = [&]<class T>(const ShapeMask& c, const Kernel& kernel, int threads, T) {
    SCOPED_TRACE(name_of(c) + ", threads " + std::to_string(threads));
    const auto problem = random_problem<T>(c.shape, c.mask);
    const auto d_o = random_cotangent<T>(c.shape);
    Workspace workspace;
    Work how = work(threads);
    how.workspace = &workspace;
    backward_whole(problem, d_o, Saved<T>(c.shape), how);
    EXPECT_LE(workspace.bytes(),
              attend_backward_bytes(c.shape, c.shape.queries, {0, c.shape.query_heads},
                                    c.shape.keys, c.shape.key_heads, threads, kernel));
  };
  for (std::size_t i = 0; i < std::size(large); ++i) {
    const ShapeMask& c = large[i];
    const auto some = kSanitized ? std::vector{1 + static_cast<int>(i % 3)} : std::vector{1, 2, 3};
    for (const int threads : some) {
      check(c, *GetParam()->f4, threads, float{});
      check(c, *GetParam()->bf16, threads, BFloat16{});
    }
  }
}

// One thread keeps sums where more have copies of dQ; parts of the keys that fit no chunk come in
// pieces, which are sums of their own.
TEST_P(Backward, BitsDoNotDependOnWhoTakesTheParts) {
  const ShapeMask cases[] = {{{70, 1400, 1, 1, 1, 256, 256}, "full"},
                             {{900, 1400, 1, 1, 1, 256, 160}, "causal"},
                             {{150, 1000, 14, 14, 14, 24, 16}, "causal"},
                             {{300, 1000, 16, 4, 4, 128, 128}, "window:200,50"}};
  for (const ShapeMask& c : cases) {
    SCOPED_TRACE(name_of(c));
    const auto problem = random_problem<float>(c.shape, c.mask);
    const auto d_o = random_cotangent<float>(c.shape);
    const Saved<float> saved(problem, d_o, work());
    const auto added_to = [&](int threads) {
      Gradients<float> out(c.shape);
      for (std::size_t i = 0; i < out.dq.numbers.size(); ++i) {
        out.dq.numbers[i] = i % 3 == 0 ? -0.0f : 0.125f * static_cast<float>(i % 7);
      }
      backward_keys(problem, d_o, saved, {{0, c.shape.keys, 1}}, work(threads), out);
      return out;
    };
    const auto one = added_to(1);
    for (const int threads : kSanitized ? std::vector{3} : std::vector{2, 3, 5}) {
      SCOPED_TRACE(threads);
      const auto more = added_to(threads);
      EXPECT_EQ(more.dq.numbers, one.dq.numbers);
      EXPECT_EQ(more.dk.numbers, one.dk.numbers);
      EXPECT_EQ(more.dv.numbers, one.dv.numbers);
    }
  }
}

/// Rows of 16 see one block of 40 keys each, somewhere: few tiles of keys, but each for long.
class Scattered final : public Mask {
 public:
  bool allows(Index, Index query, Index key) const override {
    return key / 40 == query / 16 * 29 % 42;
  }
  std::string spec() const override { return "scattered"; }
};

// Long rows make a cache of few tiles. Where queries see few at a time, one pass takes them all,
// each in a slot while it is seen.
TEST_P(Backward, KeysComeAndGoInFewSlots) {
  const ShapeMask cases[] = {{{1700, 1700, 1, 1, 1, 256, 256}, "stream:sink=5,recent=40"},
                             {{1700, 1700, 3, 1, 1, 256, 256}, "window:30,10"},
                             {{900, 1700, 4, 2, 1, 256, 256}, "window:7,7@0-1;window:0,40@2-3"},
                             {{680, 1700, 1, 1, 1, 256, 256}, "full"}};  // Scattered
  for (const ShapeMask& c : cases) {
    SCOPED_TRACE(name_of(c));
    auto problem = random_problem<float>(c.shape, c.mask);
    if (c.mask == "full") problem.mask = std::make_shared<Scattered>();
    check(problem, 3e-6);
  }
  const Shape longer{800, 3400, 1, 1, 1, 256, 256};  // tiles of bfloat16 are larger
  check(random_problem<BFloat16>(longer, "stream:sink=5,recent=40"), 8e-3);
}

/// All that there are; under a sanitizer those whose code is not another's.
std::vector<const Isa*> isas_to_test() {
  std::vector<const Isa*> some;
  for (const Isa* isa : available_isas()) {
    const bool same = std::any_of(some.begin(), some.end(), [&](const Isa* other) {
      return other->f4->backward == isa->f4->backward &&
             other->bf16->backward == isa->bf16->backward;
    });
    if (!kSanitized || !same) some.push_back(isa);
  }
  return some;
}

INSTANTIATE_TEST_SUITE_P(Isa, Backward, testing::ValuesIn(isas_to_test()),
                         [](const auto& one) { return std::string(one.param->name); });

TEST(BackwardPoll, GoesOnWhileDqIsAddedUp) {
  const Shape shape{1024, 2048, 8, 1, 1, 64, 64};
  const auto problem = random_problem<float>(shape, "full");
  const auto d_o = random_cotangent<float>(shape);
  const Tensor<float> lse(shape.queries, shape.query_heads, 1);
  const Tensor<float> delta = lse;
  // One thread has sums of parts, two have copies, of which each adds up its rows.
  for (const int threads : {1, 2}) {
    Gradients<float> out(shape);
    // Rows of dQ are written when the products are done, from the first on.
    bool between = false;
    const std::size_t last = out.dq.numbers.size() / static_cast<std::size_t>(threads) - 1;
    const auto poll = [&] { between |= out.dq.numbers.front() != 0 && out.dq.numbers[last] == 0; };
    attend_backward(problem.q.view(), problem.k.view(), problem.v.view(), d_o.view(), lse.view(),
                    delta.view(), out.dq.view(), out.dk.view(), out.dv.view(), everything(shape),
                    *problem.mask, {.threads = threads, .poll = poll});
    EXPECT_TRUE(between) << threads;
  }
}

TEST(BackwardDouble, MatchesTheReferenceToRounding) {
  for (const auto& [c, variant] : shapes_and_variants()) {
    SCOPED_TRACE(name_of(c) + ", " + variant.name);
    auto problem = random_problem<double>(c.shape, c.mask);
    apply(variant, problem);
    const auto d_o = random_cotangent<double>(c.shape);
    const Saved<double> saved(problem, d_o, {});
    expect_near(backward_whole(problem, d_o, saved, {}), reference_of(problem, d_o), 1e-13);
  }
}

/// The reference's gradients are the differences of the reference's own loss sum(dO * O).
TEST(ReferenceGradients, AreFiniteDifferencesOfTheReference) {
  const Shape shape{7, 9, 4, 2, 1, 5, 6};
  for (const Variant& variant : variants_of_scores()) {
    SCOPED_TRACE(variant.name);
    auto p = random_problem<double>(shape, "causal");
    apply(variant, p);
    const auto d_o = random_cotangent<double>(shape);
    const auto loss = [&] {
      double sum = 0;
      for (Index row = 0; row < shape.queries; ++row) {
        for (Index h = 0; h < shape.query_heads; ++h) {
          const ReferenceRow r = reference_row<double>(shape, *p.mask, p.score, p.q.view(),
                                                       p.k.view(), p.v.view(), h, row, p.weights());
          for (Index i = 0; i < shape.d_v; ++i) {
            sum += r.o[static_cast<std::size_t>(i)] * d_o.view().at(row, h)[i];
          }
        }
      }
      return sum;
    };
    const auto right = reference_of(p, d_o);
    const auto compare = [&](Tensor<double>& x, const std::vector<double>& gradient) {
      for (std::size_t i = 0; i < x.numbers.size(); ++i) {
        constexpr double kStep = 1e-5;
        const double at = x.numbers[i];
        x.numbers[i] = at + kStep;
        const double up = loss();
        x.numbers[i] = at - kStep;
        const double down = loss();
        x.numbers[i] = at;
        EXPECT_NEAR(gradient[i], (up - down) / (2 * kStep), 1e-7);
      }
    };
    compare(p.q, right.dq);
    compare(p.k, right.dk);
    compare(p.v, right.dv);
  }
}

}  // namespace
}  // namespace dattn
