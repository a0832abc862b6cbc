// Latent attention decoded over threads, against the layer in double.
#include "parallel/latent_decoder.hpp"

#include <cmath>

#include "kernels/latent/reference.hpp"
#include "parallel/latent_values.hpp"
#include "tests/parallel/on_all_ranks.hpp"
#include "tests/sanitized.hpp"

namespace dattn::testing {
namespace {

LatentSizes small() {
  return {
      .model = 48, .heads = 6, .q_rank = 20, .kv_rank = 24, .d_nope = 10, .d_rope = 6, .d_v = 8};
}

/// Any numbers, the same for a token however it is asked for.
void hidden_of(const LatentSizes& sizes, std::size_t sequence, const Runs& tokens, float* x) {
  for (const Run& run : tokens) {
    for (Index i = 0; i < run.count; ++i) {
      for (Index d = 0; d < sizes.model; ++d) {
        const auto n = static_cast<double>(run.at(i) * 131 + d * 17 + static_cast<Index>(sequence));
        *x++ = static_cast<float>(std::sin(n * n * 0.37 + n));
      }
    }
  }
}

TEST(LatentDecoder, AgreesWithTheLayerInDoubleInEveryForm) {
  const LatentSizes sizes = small();
  const std::vector<Index> start{9, 0, 30};
  for (const int ranks : {1, 2, 3, 4, 5, 7, 8}) {
    if (kSanitized && ranks > 4) continue;
    for (const Strategy& form : decode_forms()) {
      for (const auto& [type, values] : {std::pair{Type::f4, Values::after},
                                         {Type::bf16, Values::after},
                                         {Type::f4, Values::before},
                                         {Type::bf16, Values::before}}) {
        if (values == Values::before && form.name != "sequence") continue;
        const Index each = ranks % 2 == 0 ? 1 : 5;  // 15 rows
        const Type weight_type = ranks % 3 == 0 || ranks % 4 == 0 ? Type::bf16 : Type::f4;
        const Decoding d = latent_decoding(sizes, {20, 11, 42}, each, type);
        ASSERT_FALSE(complaint(d));
        const auto make = [&](Range heads) {
          LatentPart part = whole(sizes);
          part.heads = heads;
          LatentWeights weights = random_weights(sizes, part, 7);
          if (weight_type == Type::bf16) round_to_bfloat16(weights);
          return weights;
        };
        on_all_ranks(ranks, {"delayed", false, 2}, 3, [&](comm::Loopback::Endpoint& end) {
          LatentDecoder<comm::Loopback::Endpoint> layer(sizes, make, d, form, std::nullopt, end, {},
                                                        weight_type, {}, values);
          const Hidden hidden = [&](std::size_t s, const Runs& tokens, float* x) {
            hidden_of(sizes, s, tokens, x);
          };
          std::vector<Index> lengths = start;
          layer.fill(lengths, hidden);
          const LatentWeights judge = make({0, sizes.heads});
          for (int step = 0; step < 2; ++step) {
            const auto count = static_cast<std::size_t>(3 * each * sizes.model);
            std::vector<float> x(count), y(count);
            for (std::size_t s = 0; s < 3; ++s) {
              hidden(s, {{lengths[s], each, 1}}, &x[s * count / 3]);
              lengths[s] += each;
            }
            const LatentTimes times = layer.step(lengths, {x.data(), 3 * each, 1, sizes.model}, y);
            EXPECT_EQ(times.messages > 0, ranks > 1);
            for (std::size_t s = 0; s < 3; ++s) {
              std::vector<float> all(static_cast<std::size_t>(lengths[s] * sizes.model));
              hidden(s, {{0, lengths[s], 1}}, all.data());
              const auto want =
                  latent_reference(judge, {all.data(), lengths[s], 1, sizes.model}, each);
              double error = 0;
              double norm = 0;
              for (std::size_t i = 0; i < want.size(); ++i) {
                const double off = static_cast<double>(y[s * count / 3 + i]) - want[i];
                error += off * off;
                norm += want[i] * want[i];
              }
              EXPECT_LE(std::sqrt(error / norm), type == Type::bf16 ? 8e-3 : 1e-5)
                  << form.name << ", W_UV " << name_of(values) << ", " << ranks
                  << " ranks, sequence " << s;
            }
          }
        });
      }
    }
  }
}

// Each prefix is cached once, and its tokens stand in a sequence where what is shared puts them.
TEST(LatentDecoder, SharesPrefixes) {
  const LatentSizes sizes = small();
  const auto make = [&](Range heads) {
    LatentPart part = whole(sizes);
    part.heads = heads;
    return random_weights(sizes, part, 7);
  };
  const LatentWeights judge = make({0, sizes.heads});
  Decoding d = latent_decoding(sizes, {4, 9, 2, 5}, 2, Type::f4);
  // 7 tokens of all, then 5 of the first three and 8 of the last.
  d.prefixes = {{{0, 4}, {0, 7}}, {{0, 3, 4}, {7, 12, 20}}};
  ASSERT_FALSE(complaint(d));
  const auto number = [](std::size_t s, Index token) {  // of a token: its own, or its prefix's
    if (token < 7) return std::pair(std::size_t{9}, token);
    if (token < (s < 3 ? 12 : 15)) return std::pair(std::size_t{s < 3 ? 10U : 11U}, token);
    return std::pair(s, token);
  };
  const Hidden hidden = [&](std::size_t s, const Runs& tokens, float* x) {
    for (const dattn::Run& run : tokens) {
      for (Index i = 0; i < run.count; ++i, x += sizes.model) {
        const auto [sequence, token] = number(s, run.at(i));
        hidden_of(sizes, sequence, {{token, 1, 1}}, x);
      }
    }
  };
  for (const int ranks : {1, 2, 3, 4, 5, 7, 8}) {
    if (kSanitized && ranks > 4) continue;
    for (const Strategy& form : decode_forms()) {
      on_all_ranks(ranks, {"delayed", false, 2}, 3, [&](comm::Loopback::Endpoint& end) {
        LatentDecoder<comm::Loopback::Endpoint> layer(sizes, make, d, form, std::nullopt, end, {});
        const std::vector<Index> before{2, 7, 0, 1};
        layer.fill(before, hidden);
        std::vector<Index> lengths = before;
        const auto part = static_cast<std::size_t>(2 * sizes.model);
        std::vector<float> x(4 * part), y(x.size());
        for (std::size_t s = 0; s < 4; ++s) {
          hidden(s, {{(s < 3 ? 12 : 15) + lengths[s], 2, 1}}, &x[s * part]);
          lengths[s] += 2;
        }
        layer.step(lengths, {x.data(), 8, 1, sizes.model}, y);
        for (std::size_t s = 0; s < 4; ++s) {
          const Index tokens = (s < 3 ? 12 : 15) + lengths[s];
          std::vector<float> all(static_cast<std::size_t>(tokens * sizes.model));
          hidden(s, {{0, tokens, 1}}, all.data());
          const auto want = latent_reference(judge, {all.data(), tokens, 1, sizes.model}, 2);
          double error = 0;
          double norm = 0;
          for (std::size_t i = 0; i < want.size(); ++i) {
            const double off = static_cast<double>(y[s * part + i]) - want[i];
            error += off * off;
            norm += want[i] * want[i];
          }
          EXPECT_LE(std::sqrt(error / norm), 1e-5)
              << form.name << ", " << ranks << " ranks, sequence " << s;
        }
        if (form.name == "heads" &&
            end.rank() == ranks - 1) {  // 20 of prefixes, 10 and 8 of sequences
          EXPECT_EQ(layer.cache_bytes(lengths), (20 + 10 + 8) * sizes.row() * 4);
        }
      });
    }
  }
}

// DeepSeek-V3: a Partial of a head has 514 numbers behind the merge and 130 before it, where each
// rank reads W_UV of 128 heads of 512 x 128.
TEST(LatentDecoder, AppliesWUvWhereItIsFewerBytes) {
  const LatentSizes sizes{.model = 7168, .heads = 128, .kv_rank = 512, .d_rope = 64, .d_v = 128};
  const ValuesBytes after = values_bytes(sizes, 10, 4, Type::bf16, Values::after);
  EXPECT_EQ(after.sent, 3 * 10 * 128 * 514 * 4);
  EXPECT_EQ(after.read, 128 * 512 * 128 * 2);
  const ValuesBytes before = values_bytes(sizes, 10, 4, Type::bf16, Values::before);
  EXPECT_EQ(before.sent, 3 * 10 * 128 * 130 * 4);
  EXPECT_EQ(before.read, 4 * 128 * 512 * 128 * 2);
  for (const int ranks : {2, 3, 8}) {
    EXPECT_EQ(fewer_bytes(sizes, 85, ranks, Type::bf16), Values::after);
    EXPECT_EQ(fewer_bytes(sizes, 86, ranks, Type::bf16), Values::before);
    EXPECT_EQ(fewer_bytes(sizes, 170, ranks, Type::f4), Values::after);
    EXPECT_EQ(fewer_bytes(sizes, 171, ranks, Type::f4), Values::before);
  }
  EXPECT_EQ(fewer_bytes(sizes, 1000, 1, Type::f4), Values::after);
}

// 1152 bytes a token and layer where the latent is on every rank, 1152 / P where tokens are split.
TEST(LatentDecoder, CachesWhatTheFormulaSays) {
  const LatentSizes sizes{
      .model = 8, .heads = 8, .kv_rank = 512, .d_nope = 4, .d_rope = 64, .d_v = 4};
  const Decoding d = latent_decoding(sizes, {64, 64}, 1, Type::bf16);
  const std::vector<Index> lengths{64, 32};
  for (const Strategy& form : decode_forms()) {
    for (const int ranks : {1, 2, 4}) {
      const Shape shape{2, 128, 8, 1, 1, 576, 512};
      const Problem problem = decoding_problem(d, form.mesh(ranks, shape));
      for (int r = 0; r < ranks; ++r) {
        const Program program = form.program(problem, r);
        const Index share = form.name == "heads" ? 1 : ranks;
        EXPECT_EQ(KvCache(problem, program, true).bytes(lengths, d), (64 + 32) * 1152 / share)
            << form.name;
      }
    }
  }
}

}  // namespace
}  // namespace dattn::testing
