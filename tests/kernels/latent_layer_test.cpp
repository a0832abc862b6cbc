// The whole layer: absorbed = expanded = the reference, on every instruction set; parts add up.
#include <gtest/gtest.h>

#include "kernels/latent/basis.hpp"
#include "tests/kernels/latent.hpp"

namespace dattn {
namespace {

constexpr double kFloat = 1e-5;
constexpr double kBFloat = 8e-3;

class LatentLayer : public testing::TestWithParam<LatentCase> {
 protected:
  LatentLayer()
      : sizes_(GetParam().sizes),
        w_(random_weights(sizes_, whole(sizes_), 3)),
        x_(latent_input(sizes_, GetParam().tokens)),
        queries_(GetParam().queries),
        all_(w_.part.heads) {}

  const std::vector<double>& expected() {
    if (y_.empty()) y_ = latent_reference(w_, x_.view(), queries_);
    return y_;
  }

  LatentSizes sizes_;
  LatentWeights w_;
  Tensor<float> x_;
  Index queries_;
  Range all_;
  std::vector<double> y_;
};

TEST_P(LatentLayer, AbsorbedAndExpandedAreTheReference) {
  for (const Isa* isa : available_isas()) {
    const Work work{.isa = isa};
    const auto absorbed = absorbed_layer<float>(w_, all_, x_.view(), queries_, work);
    EXPECT_LT(relative_error(absorbed.numbers, expected()), kFloat) << isa->name;
    const auto expanded = expanded_layer<float>(w_, all_, x_.view(), queries_, work);
    EXPECT_LT(relative_error(expanded.numbers, expected()), kFloat) << isa->name;
  }
}

TEST_P(LatentLayer, BFloat16CacheIsWithinItsBound) {
  for (const Isa* isa : available_isas()) {
    const Work work{.isa = isa};
    const auto absorbed = absorbed_layer<BFloat16>(w_, all_, x_.view(), queries_, work);
    EXPECT_LT(relative_error(absorbed.numbers, expected()), kBFloat) << isa->name;
    const auto expanded = expanded_layer<BFloat16>(w_, all_, x_.view(), queries_, work);
    EXPECT_LT(relative_error(expanded.numbers, expected()), kBFloat) << isa->name;
  }
}

TEST_P(LatentLayer, HeadsAddUp) {
  for (const Index parts : {2, 3, 5}) {
    std::vector<double> sum(expected().size());
    for (Index part = 0; part < parts; ++part) {
      LatentPart mine = w_.part;
      mine.heads = even_part(sizes_.heads, parts, part);
      const auto y =
          absorbed_layer<float>(slice(w_, mine), mine.heads, x_.view(), queries_, Work{});
      // The same head range of the whole weights, without a copy.
      EXPECT_EQ(absorbed_layer<float>(w_, mine.heads, x_.view(), queries_, Work{}).numbers,
                y.numbers);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += static_cast<double>(y.numbers[i]);
    }
    EXPECT_LT(relative_error(sum, expected()), kFloat) << parts;
  }
}

TEST_P(LatentLayer, FoldedAndRotatedWeightsComputeTheSame) {
  const auto y = absorbed_layer<float>(folded(w_), all_, x_.view(), queries_, Work{});
  EXPECT_LT(relative_error(y.numbers, expected()), kFloat);
  Tensor<float> latents = random_tensor<float>(50, 1, sizes_.kv_rank, 5);
  std::vector<std::vector<float>> bases{pca_basis(latents.view())};
  if ((sizes_.kv_rank & (sizes_.kv_rank - 1)) == 0) {
    bases.push_back(hadamard_basis(sizes_.kv_rank, 9));
  }
  for (const auto& u : bases) {
    const LatentWeights turned = rotated(w_, u);
    EXPECT_LT(relative_error(latent_reference(turned, x_.view(), queries_), expected()), kFloat);
    const auto absorbed = absorbed_layer<float>(turned, all_, x_.view(), queries_, Work{});
    EXPECT_LT(relative_error(absorbed.numbers, expected()), kFloat);
  }
}

TEST_P(LatentLayer, BitsDoNotDependOnThreads) {
  const auto one = absorbed_layer<float>(w_, all_, x_.view(), queries_, {.threads = 1});
  const auto three = absorbed_layer<float>(w_, all_, x_.view(), queries_, {.threads = 3});
  EXPECT_EQ(one.numbers, three.numbers);
}

std::string test_name(const testing::TestParamInfo<LatentCase>& info) {
  std::string name = info.param.name;
  std::replace(name.begin(), name.end(), ' ', '_');
  return name;
}
INSTANTIATE_TEST_SUITE_P(Cases, LatentLayer, testing::ValuesIn(latent_cases()), test_name);

TEST(LatentRealSizes, DeepSeekV2Lite) {
  const LatentSizes sizes = *find_latent_model("deepseek-v2-lite");
  const LatentWeights w = random_weights(sizes, whole(sizes), 1);
  const Tensor<float> x = latent_input(sizes, 40);
  for (const Index queries : {1, 9}) {  // 16 lanes: decode; 144: panels
    const auto expected = latent_reference(w, x.view(), queries);
    for (const Isa* isa : available_isas()) {
      const Work work{.isa = isa};
      const auto f4 = absorbed_layer<float>(w, w.part.heads, x.view(), queries, work);
      EXPECT_LT(relative_error(f4.numbers, expected), kFloat) << isa->name;
      const auto bf16 = absorbed_layer<BFloat16>(w, w.part.heads, x.view(), queries, work);
      EXPECT_LT(relative_error(bf16.numbers, expected), kBFloat) << isa->name;
      const auto expanded = expanded_layer<float>(w, w.part.heads, x.view(), queries, work);
      EXPECT_LT(relative_error(expanded.numbers, expected), kFloat) << isa->name;
    }
  }
}

// Sequences of a batch, of different lengths and numbers of new tokens, each as if alone.
TEST(LatentBatch, SequencesDoNotSeeEachOther) {
  const LatentSizes sizes{
      .model = 20, .heads = 6, .kv_rank = 24, .d_nope = 8, .d_rope = 6, .d_v = 8};
  struct Length {
    Index tokens, queries;
  };
  const std::vector<Length> lengths{{1, 1}, {90, 1}, {33, 16}, {5, 0}, {700, 5}};
  std::vector<Tensor<float>> caches;
  std::vector<LatentSequence<float>> batch;
  Index queries = 0;
  for (const auto& [tokens, asking] : lengths) {
    caches.push_back(random_tensor<float>(tokens, 1, sizes.row(), 7u));
    queries += asking;
  }
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    batch.push_back({caches[i].view(), lengths[i].queries});
  }
  const Tensor<float> q = random_tensor<float>(queries, sizes.heads, sizes.row(), 8);
  Tensor<float> out(queries, sizes.heads, sizes.kv_rank + 2);
  clear(out.view());
  decode_latent<float>(sizes, q.view(), batch, out.view(), Work{});
  Tensor<float> o(queries, sizes.heads, sizes.kv_rank);
  std::vector<float> lse(static_cast<std::size_t>(queries * sizes.heads));
  finish(View<const float>(out.view()), std::span(o.numbers), std::span(lse));
  Index row = 0;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const Shape shape = absorbed_shape(sizes, lengths[i].queries, lengths[i].tokens, sizes.kv_rank);
    const MaskPtr mask = parse_mask("causal", shape);
    const View<const float> rows = caches[i].view();
    for (Index n = 0; n < lengths[i].queries; ++n, ++row) {
      for (Index h = 0; h < sizes.heads; ++h) {
        const View<const float> asking{q.view().at(row - n, 0), lengths[i].queries, sizes.heads,
                                       sizes.row()};
        const ReferenceRow expected =
            reference_row<float>(shape, *mask, {.scale = sizes.scale()}, asking, rows,
                                 latent_values(rows, sizes.kv_rank), h, n);
        const float* found = o.view().at(row, h);
        EXPECT_LT(relative_error(std::vector<float>(found, found + sizes.kv_rank), expected.o),
                  1e-6);
        EXPECT_NEAR(lse[static_cast<std::size_t>(row * sizes.heads + h)], expected.lse, 2e-6);
      }
    }
  }
}

}  // namespace
}  // namespace dattn
