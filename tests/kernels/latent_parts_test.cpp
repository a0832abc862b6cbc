// Sizes, weights, operators and bases of latent attention, against loops written out by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "kernels/latent/basis.hpp"
#include "kernels/latent/product.hpp"
#include "tests/kernels/latent.hpp"

namespace dattn {
namespace {

const LatentSizes kSmall{.model = 21,
                         .heads = 6,
                         .q_rank = 10,
                         .kv_rank = 16,
                         .d_nope = 5,
                         .d_rope = 4,
                         .d_v = 7,
                         .rope = kStretched};

TEST(LatentSizesTest, PublishedModels) {
  ASSERT_EQ(latent_models().size(), 3u);
  for (const auto& [name, sizes] : latent_models()) {
    EXPECT_FALSE(complaint(sizes)) << name;
    EXPECT_EQ(sizes.row(), 576) << name;
    EXPECT_EQ(sizes.d_qk(), 192) << name;
    EXPECT_EQ(rope_magnitude(sizes.rope), 1) << name;
  }
  // 0.1 mscale ln(factor) + 1, squared, over sqrt(192).
  EXPECT_NEAR(find_latent_model("deepseek-v2-lite")->scale(), 0.1147213867929261, 1e-12);
  EXPECT_NEAR(find_latent_model("deepseek-v3")->scale(), 0.1352337788608801, 1e-12);
  EXPECT_NEAR(find_latent_model("kimi-k2")->scale(), 0.1308607999629501, 1e-12);
  EXPECT_EQ(find_latent_model("llama"), nullptr);
}

TEST(LatentSizesTest, ComplaintsNameTheSize) {
  const auto of = [](auto change) {
    LatentSizes sizes = kSmall;
    change(sizes);
    return complaint(sizes).value_or("");
  };
  using testing::HasSubstr;
  EXPECT_EQ(of([](auto&) {}), "");
  EXPECT_THAT(of([](auto& s) { s.model = 0; }), HasSubstr("model is 0"));
  EXPECT_THAT(of([](auto& s) { s.heads = -1; }), HasSubstr("heads is -1"));
  EXPECT_THAT(of([](auto& s) { s.q_rank = -2; }), HasSubstr("q rank is -2"));
  EXPECT_THAT(of([](auto& s) { s.d_rope = 3; }), HasSubstr("d_rope is 3"));
  EXPECT_THAT(of([](auto& s) { s.rope.copies = 4; }), HasSubstr("4 copies"));
  EXPECT_THAT(of([](auto& s) { s.rope.copies = 0; }), HasSubstr("copies of RoPE is 0"));
  EXPECT_THAT(of([](auto& s) { s.heads = Index{1} << 40; }), HasSubstr("columns"));
  EXPECT_THAT(of([](auto& s) { s.rope.base = 1; }), HasSubstr("base"));
  EXPECT_THAT(of([](auto& s) { s.rope.factor = 0.5; }), HasSubstr("factor"));
  EXPECT_THAT(of([](auto& s) { s.rope.beta_slow = 64; }), HasSubstr("beta_fast"));
  EXPECT_THAT(of([](auto& s) { s.rope.mscale = -1; }), HasSubstr("mscale"));
  EXPECT_THAT(of([](auto& s) { s.epsilon = NAN; }), HasSubstr("epsilon"));
}

TEST(LatentWeightsTest, GenerationDoesNotDependOnTheSlice) {
  for (const Index q_rank : {Index{0}, kSmall.q_rank}) {
    LatentSizes sizes = kSmall;
    sizes.q_rank = q_rank;
    const LatentWeights all = random_weights(sizes, whole(sizes), 42);
    for (const LatentPart& part :
         {LatentPart{{2, 5}, {0, 16}, {0, 16}}, LatentPart{{0, 6}, {3, 9}, {0, 16}},
          LatentPart{{5, 6}, {8, 11}, {4, 12}}, LatentPart{{1, 1}, {7, 7}, {7, 7}}}) {
      const LatentWeights made = random_weights(sizes, part, 42, 3);
      const LatentWeights cut = slice(all, part);
      EXPECT_EQ(made.down_q, cut.down_q);
      EXPECT_EQ(made.q_gamma, cut.q_gamma);
      EXPECT_EQ(made.up_q, cut.up_q);
      EXPECT_EQ(made.down_kv, cut.down_kv);
      EXPECT_EQ(made.kv_gamma, cut.kv_gamma);
      EXPECT_EQ(made.up_k, cut.up_k);
      EXPECT_EQ(made.up_v, cut.up_v);
      EXPECT_EQ(made.out, cut.out);
      check_weights(made);
    }
    EXPECT_NE(random_weights(sizes, whole(sizes), 43).out, all.out);
  }
}

// One element of each matrix at the place that its shape says.
TEST(LatentWeightsTest, SlicesTakeTheRightPlaces) {
  const LatentWeights all = random_weights(kSmall, whole(kSmall), 1);
  const LatentWeights cut = slice(all, {{4, 6}, {9, 12}, {8, 14}});
  const auto at = [](const std::vector<float>& m, Index i) {
    return m[static_cast<std::size_t>(i)];
  };
  EXPECT_EQ(at(cut.up_q, (3 * 2 + 1) * 9 + 6), at(all.up_q, (3 * 6 + 5) * 9 + 6));
  EXPECT_EQ(at(cut.down_kv, 7 * 10 + 2), at(all.down_kv, 7 * 20 + 10));
  EXPECT_EQ(at(cut.down_kv, 7 * 10 + 6 + 3), at(all.down_kv, 7 * 20 + 16 + 3));
  EXPECT_EQ(at(cut.kv_gamma, 5), at(all.kv_gamma, 13));
  EXPECT_EQ(at(cut.up_k, (1 * 3 + 2) * 5 + 4), at(all.up_k, (5 * 16 + 11) * 5 + 4));
  EXPECT_EQ(at(cut.up_v, (0 * 3 + 1) * 7 + 3), at(all.up_v, (4 * 16 + 10) * 7 + 3));
  EXPECT_EQ(at(cut.out, (1 * 7 + 6) * 21 + 20), at(all.out, (5 * 7 + 6) * 21 + 20));
}

TEST(LatentOperators, ProductsOfAllKinds) {
  for (const Index rows : {1, 2, 70, 300}) {
    for (const Index columns : {1, 130, 600}) {
      for (const Index inner : {0, 1, 37}) {
        for (const bool transposed : {false, true}) {
          for (const bool add : {false, true}) {
            const auto a = random_tensor<float>(rows, 1, inner + 3, 1);
            const auto b = transposed ? random_tensor<float>(columns, 1, inner + 2, 2)
                                      : random_tensor<float>(inner, 1, columns + 2, 2);
            auto c = random_tensor<float>(rows, 1, columns + 1, 3);
            const auto before = c;
            const Product product{.a = a.numbers.data(),
                                  .a_stride = a.dim,
                                  .b = b.numbers.data(),
                                  .b_stride = b.dim,
                                  .transposed = transposed,
                                  .c = c.numbers.data(),
                                  .c_stride = c.dim,
                                  .rows = rows,
                                  .columns = columns,
                                  .inner = inner,
                                  .add = add};
            multiply({&product, 1}, {.threads = 2});
            double worst = 0;
            for (Index i = 0; i < rows; ++i) {
              for (Index j = 0; j < columns; ++j) {
                double sum = add ? static_cast<double>(before.view().at(i, 0)[j]) : 0;
                for (Index d = 0; d < inner; ++d) {
                  sum +=
                      static_cast<double>(a.view().at(i, 0)[d]) *
                      static_cast<double>(transposed ? b.view().at(j, 0)[d] : b.view().at(d, 0)[j]);
                }
                worst = std::max(worst, std::abs(static_cast<double>(c.view().at(i, 0)[j]) - sum));
              }
              EXPECT_EQ(c.view().at(i, 0)[columns], before.view().at(i, 0)[columns]);
            }
            EXPECT_LT(worst, 3e-5) << rows << ' ' << columns << ' ' << inner << transposed << add;
          }
        }
      }
    }
  }
}

// bfloat16 matrices by every kernel of this machine, few rows and many; a number behind each row of
// c stays.
TEST(LatentOperators, ProductsWithBFloat16) {
  for (const Isa* isa : available_isas()) {
    for (const Index rows : {1, 3, 11, 16, 17}) {
      for (const Index columns : {5, 1100}) {
        for (const Index inner : {0, 1, rows == 17 ? 300 : 61}) {
          for (const bool transposed : {false, true}) {
            for (const bool add : {false, true}) {
              const auto a = random_tensor<float>(rows, 1, inner + 3, 1);
              const auto wide = transposed ? random_tensor<float>(columns, 1, inner + 2, 2)
                                           : random_tensor<float>(inner, 1, columns + 2, 2);
              std::vector<BFloat16> b;
              for (const float x : wide.numbers) b.emplace_back(x);
              auto c = random_tensor<float>(rows, 1, columns + 1, 3);
              const auto before = c;
              const Product product{.a = a.numbers.data(),
                                    .a_stride = a.dim,
                                    .b = b.data(),
                                    .b_stride = wide.dim,
                                    .transposed = transposed,
                                    .c = c.numbers.data(),
                                    .c_stride = c.dim,
                                    .rows = rows,
                                    .columns = columns,
                                    .inner = inner,
                                    .add = add};
              multiply({&product, 1}, {.threads = 2, .isa = isa});
              double worst = 0;
              for (Index i = 0; i < rows; ++i) {
                for (Index j = 0; j < columns; ++j) {
                  double sum = add ? static_cast<double>(before.view().at(i, 0)[j]) : 0;
                  for (Index d = 0; d < inner; ++d) {
                    const Index at = transposed ? j * wide.dim + d : d * wide.dim + j;
                    sum += static_cast<double>(a.view().at(i, 0)[d]) *
                           static_cast<double>(b[static_cast<std::size_t>(at)]);
                  }
                  worst =
                      std::max(worst, std::abs(static_cast<double>(c.view().at(i, 0)[j]) - sum));
                }
                EXPECT_EQ(c.view().at(i, 0)[columns], before.view().at(i, 0)[columns]);
              }
              EXPECT_LT(worst, 1e-4) << isa->name << ' ' << rows << ' ' << columns << ' ' << inner
                                     << transposed << add;
            }
          }
        }
      }
    }
  }
}

TEST(LatentOperators, PollThrowsThroughProducts) {
  const auto a = random_tensor<float>(300, 1, 300, 1);
  auto c = a;
  const Product product{.a = a.numbers.data(),
                        .a_stride = 300,
                        .b = a.numbers.data(),
                        .b_stride = 300,
                        .c = c.numbers.data(),
                        .c_stride = 300,
                        .rows = 300,
                        .columns = 300,
                        .inner = 300};
  const Work work{.poll = [] { throw std::runtime_error("poll"); }};
  EXPECT_THROW(multiply({&product, 1}, work), std::runtime_error);
}

TEST(LatentOperators, RmsNorm) {
  const auto x = random_tensor<float>(4, 1, 9, 1);
  std::vector<float> gamma(9);
  for (std::size_t i = 0; i < 9; ++i) gamma[i] = 1 + static_cast<float>(i);
  Tensor<float> with(4, 1, 9), without(4, 1, 9), given(4, 1, 9);
  rms_norm(x.view(), 0.5, gamma, with.view());
  rms_norm(x.view(), 0.5, {}, without.view());
  rms_norm(x.view(), std::vector<float>{1, 2, 3, 4}, gamma, given.view());
  for (Index r = 0; r < 4; ++r) {
    double sum = 0;
    for (Index i = 0; i < 9; ++i) sum += std::pow(static_cast<double>(x.view().at(r, 0)[i]), 2);
    const double rms = std::sqrt(sum / 9 + 0.5);
    for (Index i = 0; i < 9; ++i) {
      const double number = static_cast<double>(x.view().at(r, 0)[i]);
      const double g = static_cast<double>(i + 1);
      EXPECT_NEAR(with.at(r, 0, i), number / rms * g, 1e-5);
      EXPECT_NEAR(without.at(r, 0, i), number / rms, 1e-6);
      EXPECT_NEAR(given.at(r, 0, i), number / static_cast<double>(r + 1) * g, 1e-5);
    }
  }
}

TEST(LatentOperators, RopeTurnsNeighbours) {
  LatentSizes sizes = kSmall;
  sizes.rope = {.base = 100};
  const RopeAngles angles(sizes, {{5, 2, 3}, {0, 1, 1}});  // positions 5, 8, 0
  const std::vector<double> positions{5, 8, 0};
  for (Index row = 0; row < 3; ++row) {
    std::vector<float> x{1, 2, 3, 4};
    angles.turn(row, x.data());
    for (std::size_t pair = 0; pair < 2; ++pair) {
      const double angle = positions[static_cast<std::size_t>(row)] * (pair == 0 ? 1 : 0.1);
      const double re = 1 + 2 * static_cast<double>(pair);
      EXPECT_NEAR(x[2 * pair], re * std::cos(angle) - (re + 1) * std::sin(angle), 1e-6);
      EXPECT_NEAR(x[2 * pair + 1], re * std::sin(angle) + (re + 1) * std::cos(angle), 1e-6);
    }
  }
}

TEST(LatentOperators, RopeOfTheCacheDependsOnPositionsNotOnRows) {
  const LatentWeights w = random_weights(kSmall, whole(kSmall), 2);
  const auto x = latent_input(kSmall, 10);
  Tensor<float> all(10, 1, kSmall.row());
  latent_rows(w, x.view(), {{0, 10, 1}}, all.view(), Work{});
  Tensor<float> odd(5, 1, kSmall.row());
  const View<const float> x_odd{x.view().at(1, 0), 5, 1, kSmall.model, 2 * kSmall.model};
  latent_rows(w, x_odd, {{1, 5, 2}}, odd.view(), Work{});
  for (Index r = 0; r < 5; ++r) {
    for (Index i = 0; i < kSmall.row(); ++i) {
      EXPECT_NEAR(odd.at(r, 0, i), all.at(2 * r + 1, 0, i), 1e-5);
    }
  }
}

// What ranks that split the latent do: each makes its slice, and scores and values add up.
TEST(LatentOperators, SlicesOfTheLatentAddUp) {
  const LatentWeights w = random_weights(kSmall, whole(kSmall), 2);
  const auto x = latent_input(kSmall, 12);
  const Runs positions{{0, 12, 1}};
  const Range heads{0, kSmall.heads};
  Tensor<float> cache(12, 1, kSmall.row());
  latent_rows(w, x.view(), positions, cache.view(), Work{});
  Tensor<float> q(12, kSmall.heads, kSmall.row());
  absorbed_queries(w, heads, x.view(), positions, q.view(), Work{});
  Tensor<float> l = random_tensor<float>(12, kSmall.heads, kSmall.kv_rank, 4);
  Tensor<float> o(12, kSmall.heads, kSmall.d_v), o_sum = o;
  up_values(w, heads, l.view(), o.view(), Work{});
  // The RMS of the whole latent, as if every rank had sent the squares of its columns.
  std::vector<float> rms(12);
  Tensor<float> c(12, 1, kSmall.row());
  latents(w, x.view(), c.view(), Work{});
  rms_of({c.numbers.data(), 12, 1, kSmall.kv_rank, kSmall.row()}, kSmall.epsilon, rms);
  constexpr Index parts = 3;
  for (Index part = 0; part < parts; ++part) {
    const Range latent = even_part(kSmall.kv_rank, parts, part);
    const Index width = latent.size() + kSmall.d_rope;
    for (const bool all_columns : {true, false}) {
      const LatentWeights mine =
          slice(w, {heads, latent, all_columns ? Range{0, kSmall.kv_rank} : latent});
      Tensor<float> rows(12, 1, width);
      if (all_columns) {
        latent_rows(mine, x.view(), positions, rows.view(), Work{});
      } else {
        Tensor<float> columns(12, 1, width);
        latents(mine, x.view(), columns.view(), Work{});
        cache_rows<float>(mine, columns.view(), rms, positions, rows.view());
      }
      Tensor<float> q_part(12, kSmall.heads, width);
      absorbed_queries(mine, heads, x.view(), positions, q_part.view(), Work{});
      for (Index n = 0; n < 12; ++n) {
        for (Index i = 0; i < width; ++i) {
          const Index whole_i =
              i < latent.size() ? latent.begin + i : kSmall.kv_rank + i - latent.size();
          EXPECT_NEAR(rows.at(n, 0, i), cache.at(n, 0, whole_i), 1e-5);
          for (Index h = 0; h < kSmall.heads; ++h) {
            EXPECT_NEAR(q_part.at(n, h, i), q.at(n, h, whole_i), 1e-5);
          }
        }
      }
    }
    const LatentWeights mine = slice(w, {heads, latent, latent});
    Tensor<float> l_part(12, kSmall.heads, latent.size()), o_part(12, kSmall.heads, kSmall.d_v);
    for (Index n = 0; n < 12; ++n) {
      for (Index h = 0; h < kSmall.heads; ++h) {
        std::copy_n(l.view().at(n, h) + latent.begin, latent.size(), l_part.view().at(n, h));
      }
    }
    up_values(mine, heads, l_part.view(), o_part.view(), Work{});
    for (std::size_t i = 0; i < o_sum.numbers.size(); ++i) o_sum.numbers[i] += o_part.numbers[i];
  }
  EXPECT_LT(relative_error(o_sum.numbers, o.numbers), 1e-6);
}

double distance_from_orthogonal(const std::vector<float>& u, Index n) {
  double worst = 0;
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j < n; ++j) {
      double sum = i == j ? -1 : 0;
      for (Index d = 0; d < n; ++d) {
        sum += static_cast<double>(u[static_cast<std::size_t>(d * n + i)]) *
               static_cast<double>(u[static_cast<std::size_t>(d * n + j)]);
      }
      worst = std::max(worst, std::abs(sum));
    }
  }
  return worst;
}

TEST(LatentBasis, HadamardIsOrthogonalAndSpreads) {
  for (const Index n : {1, 2, 64, 512}) {
    const auto u = hadamard_basis(n, 7);
    EXPECT_LT(distance_from_orthogonal(u, n), 1e-5) << n;
    for (const float x : u) ASSERT_NEAR(std::abs(x), 1 / std::sqrt(static_cast<double>(n)), 1e-7);
  }
  EXPECT_NE(hadamard_basis(64, 7), hadamard_basis(64, 8));
  EXPECT_THROW(hadamard_basis(12, 7), std::invalid_argument);
}

TEST(LatentBasis, PcaIsOrthogonalAndDecorrelates) {
  constexpr Index n = 24;
  constexpr Index tokens = 400;
  auto x = random_tensor<float>(tokens, 1, n, 3);
  for (Index r = 0; r < tokens; ++r) {
    float* row = x.view().at(r, 0);
    for (Index i = 1; i < n; ++i) row[i] = row[i] * static_cast<float>(i % 5 + 1) + row[i - 1];
    row[3] += 10;  // a mean is no variance
  }
  const auto u = pca_basis(x.view());
  EXPECT_LT(distance_from_orthogonal(u, n), 1e-6);
  std::vector<double> mean(n);
  std::vector<std::vector<double>> turned;
  for (Index r = 0; r < tokens; ++r) {
    turned.emplace_back(n);
    for (Index j = 0; j < n; ++j) {
      for (Index i = 0; i < n; ++i) {
        turned.back()[static_cast<std::size_t>(j)] +=
            static_cast<double>(x.at(r, 0, i)) *
            static_cast<double>(u[static_cast<std::size_t>(i * n + j)]);
      }
      mean[static_cast<std::size_t>(j)] += turned.back()[static_cast<std::size_t>(j)] / tokens;
    }
  }
  double before = 1e300;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      double covariance = 0;
      for (const auto& row : turned) {
        covariance += (row[i] - mean[i]) * (row[j] - mean[j]) / tokens;
      }
      if (i != j) {
        EXPECT_NEAR(covariance, 0, 1e-4);
      } else {
        EXPECT_LT(covariance, before);  // the largest variance first
        before = covariance;
      }
    }
  }
  EXPECT_THROW(pca_basis({nullptr, 0, 1, 4}), std::invalid_argument);
  x.at(5, 0, 5) = INFINITY;
  EXPECT_THROW(pca_basis(x.view()), std::invalid_argument);
}

}  // namespace
}  // namespace dattn
