// Prefill in a ring of latents over threads, handed over to every form of decoding: y against the
// layer in double, the cache against one that is filled directly, bytes against formulas.
#include "parallel/latent_prefill.hpp"

#include <cmath>

#include "kernels/latent/reference.hpp"
#include "parallel/latent_slices.hpp"
#include "tests/parallel/on_all_ranks.hpp"
#include "tests/sanitized.hpp"

namespace dattn::testing {
namespace {

using End = comm::Loopback::Endpoint;

// Of 22 heads 16 are attended first; the latents of 5 ranks in float32 are kept for the others,
// those of 8 in bfloat16 are more than the queries and Partials of all heads.
const LatentSizes kSizes{
    .model = 40, .heads = 22, .q_rank = 20, .kv_rank = 24, .d_nope = 10, .d_rope = 6, .d_v = 8};
const std::vector<Index> kLengths{9, 0, 1100,
                                  30};  // more keys than are expanded at a time, if P = 1
const std::vector<Index> kCapacity{12, 5, 1102, 33};

/// Any numbers, the same for a token however it is asked for.
void hidden_of(std::size_t sequence, const Runs& tokens, float* x) {
  for (const Run& run : tokens) {
    for (Index i = 0; i < run.count; ++i) {
      for (Index d = 0; d < kSizes.model; ++d) {
        const auto n = static_cast<double>(run.at(i) * 131 + d * 17 + static_cast<Index>(sequence));
        *x++ = static_cast<float>(std::sin(n * n * 0.37 + n));
      }
    }
  }
}

LatentWeights weights_of(Range heads, Type type) {
  LatentPart part = whole(kSizes);
  part.heads = heads;
  LatentWeights weights = random_weights(kSizes, part, 7);
  if (type == Type::bf16) round_to_bfloat16(weights);
  return weights;
}

/// The relative error of y of a rank's own tokens.
double error_of(const LatentPrefill<End>& prefill, const Decoding& d, int ranks, int rank,
                const std::vector<std::vector<double>>& want) {
  double error = 0;
  double norm = 0;
  const float* y = prefill.y().data();
  for (std::size_t s = 0; s < kLengths.size(); ++s) {
    const Run own = own_tokens(d, s, kLengths[s], ranks, rank);
    for (Index i = 0; i < own.count * kSizes.model; ++i) {
      const Index at = own.at(i / kSizes.model) * kSizes.model + i % kSizes.model;
      const double expected = want[s][static_cast<std::size_t>(at)];
      const double off = static_cast<double>(*y++) - expected;
      error += off * off;
      norm += expected * expected;
    }
  }
  EXPECT_EQ(y, prefill.y().data() + prefill.y().size());
  return norm > 0 ? std::sqrt(error / norm) : 0;
}

std::vector<std::vector<double>> reference_of(Type weight_type) {
  std::vector<std::vector<double>> y;
  const LatentWeights judge = weights_of({0, kSizes.heads}, weight_type);
  for (std::size_t s = 0; s < kLengths.size(); ++s) {
    std::vector<float> x(static_cast<std::size_t>(kLengths[s] * kSizes.model));
    hidden_of(s, {{0, kLengths[s], 1}}, x.data());
    y.push_back(latent_reference(judge, {x.data(), kLengths[s], 1, kSizes.model}, kLengths[s]));
  }
  return y;
}

Index tokens_of(const Decoding& d, int ranks, int rank) {
  Index tokens = 0;
  for (std::size_t s = 0; s < kLengths.size(); ++s) {
    for (Index t = 0; t < kLengths[s]; ++t) tokens += (d.first(s) + t) % ranks == rank;
  }
  return tokens;
}

TEST(LatentPrefill, AgreesWithTheLayerAndLeavesTheCacheOfEveryForm) {
  const std::vector<std::vector<double>> want[] = {reference_of(Type::f4),
                                                   reference_of(Type::bf16)};
  Index all = 0;
  for (const Index length : kLengths) all += length;
  for (const int ranks : {1, 2, 3, 5, 8}) {
    if (kSanitized && ranks > 3) continue;
    const Type type = ranks % 2 == 0 ? Type::bf16 : Type::f4;
    const Type weight_type = ranks % 3 == 0 ? Type::bf16 : Type::f4;
    const Decoding d = latent_decoding(kSizes, kCapacity, 1, type);
    const Index row = kSizes.row() * bytes_of(type);
    const auto make = [&](Range heads) { return weights_of(heads, weight_type); };
    on_all_ranks(ranks, {"delayed", ranks == 2, 2}, 3, [&](End& end) {
      LatentPrefill<End> prefill(kSizes, make({0, kSizes.heads}), d, kLengths, end, {},
                                 weight_type);
      prefill.make(hidden_of);
      const LatentTimes times = prefill.run();
      // Everything but what the right neighbour has, and that it sends itself.
      EXPECT_EQ(times.bytes_sent,
                ranks == 1 ? 0 : (all - tokens_of(d, ranks, (end.rank() + 1) % ranks)) * row);
      EXPECT_EQ(std::ssize(prefill.rows()), tokens_of(d, ranks, end.rank()) * row);
      EXPECT_LE(error_of(prefill, d, ranks, end.rank(), want[weight_type == Type::bf16]),
                type == Type::bf16 ? 8e-3 : 1e-5)
          << ranks << " ranks";

      for (const Strategy& form : decode_forms()) {
        LatentDecoder<End> taken(kSizes, make, d, form, std::nullopt, end, {}, weight_type);
        LatentDecoder<End> filled(kSizes, make, d, form, std::nullopt, end, {}, weight_type);
        const HandOver done = taken.take(prefill.rows(), kLengths);
        filled.fill(kLengths, hidden_of);
        Index has = 0;
        for (std::size_t s = 0; s < kLengths.size(); ++s) {
          for (Index t = 0; t < kLengths[s]; ++t) {
            const auto at = taken.decoder().cache().row_of(d.first(s) + t);
            if (!at) continue;
            ++has;
            const std::byte* bytes = taken.decoder().cache().keys(*at);
            ASSERT_TRUE(std::equal(bytes, bytes + row, filled.decoder().cache().keys(*at)))
                << form.name << ", " << ranks << " ranks, sequence " << s << ", token " << t;
          }
        }
        // Whole rows to everybody, or nothing.
        const bool all_rows = form.name == "heads" && ranks > 1;
        EXPECT_EQ(has, all_rows ? all : tokens_of(d, ranks, end.rank())) << form.name;
        EXPECT_EQ(done.bytes_sent, all_rows ? (ranks - 1) * std::ssize(prefill.rows()) : 0);
        EXPECT_EQ(done.messages, all_rows ? ranks - 1 : 0);
      }
    });
  }
}

// DeepSeek-V3, bfloat16: of each token of a rank 192 numbers of a query and 130 of a Partial,
// for 16 heads of 128, beside what its queries are made from, y, and the latents of all ranks.
TEST(LatentPrefill, HoldsSomeHeadsAtATime) {
  const LatentSizes sizes{
      .model = 7168, .heads = 128, .q_rank = 1536, .kv_rank = 512, .d_nope = 128, .d_rope = 64};
  const auto a_token = [&](int ranks) {
    const Index context = 16384 * ranks;
    const Decoding d = latent_decoding(sizes, {context}, 1, Type::bf16);
    const Index few = prefill_bytes(sizes, d, std::vector<Index>{context / 2}, ranks, 1);
    return static_cast<double>(prefill_bytes(sizes, d, std::vector<Index>{context}, ranks, 1) -
                               few) /
           8192;
  };
  const double head = 192 * 2 + 130 * 4;
  const double others = (1536 + 7168) * 4;
  EXPECT_NEAR(a_token(2), 16 * head + others + 2 * 1152, 64);
  EXPECT_NEAR(a_token(64), 16 * head + others + 64 * 1152, 64);
  EXPECT_NEAR(a_token(256), 128 * head + others + 3 * 1152, 64);
}

TEST(LatentPrefill, IsCutForSlices) {
  const std::vector<std::vector<double>> want = reference_of(Type::f4);
  struct Case {
    int ranks;
    Slicing slicing;
    Type type;
  };
  using Basis = Slicing::Basis;
  for (const Case& c : {Case{4, {.slices = 2, .exact = false, .basis = Basis::pca}, Type::f4},
                        Case{3, {.slices = 3, .exact = true, .basis = Basis::none}, Type::bf16}}) {
    const Decoding d = latent_decoding(kSizes, kCapacity, 1, c.type);
    const auto make = [&](Range heads) { return weights_of(heads, Type::f4); };
    on_all_ranks(c.ranks, {"delayed", false, 2}, 3, [&](End& end) {
      std::vector<float> numbers(static_cast<std::size_t>(200 * kSizes.model));
      hidden_of(9, {{0, 200, 1}}, numbers.data());
      const View<const float> calibration{numbers.data(), 200, 1, kSizes.model};
      LatentPrefill<End> prefill(kSizes,
                                 in_basis(make({0, kSizes.heads}), c.slicing, calibration, {}), d,
                                 kLengths, end, {});
      prefill.make(hidden_of);
      prefill.run();
      EXPECT_LE(error_of(prefill, d, c.ranks, end.rank(), want),
                c.type == Type::bf16 ? 8e-3 : 1e-5);
      SlicedDecoder<End> taken(kSizes, make, d, c.slicing, calibration, end, {});
      SlicedDecoder<End> filled(kSizes, make, d, c.slicing, calibration, end, {});
      const HandOver done = taken.take(prefill.rows(), kLengths);
      filled.fill(kLengths, hidden_of);
      for (std::size_t s = 0; s < kLengths.size(); ++s) {
        const auto got = taken.cached({d.first(s), d.first(s) + kLengths[s]});
        const auto direct = filled.cached({d.first(s), d.first(s) + kLengths[s]});
        EXPECT_TRUE(std::equal(got.begin(), got.end(), direct.begin(), direct.end())) << s;
      }
      Index numbers_of_others = 0;
      for (int r = 0; r < c.ranks; ++r) {
        if (r != end.rank()) numbers_of_others += kSizes.kv_rank / c.slicing.slices + kSizes.d_rope;
      }
      EXPECT_EQ(done.bytes_sent,
                numbers_of_others * bytes_of(c.type) * tokens_of(d, c.ranks, end.rank()));
      EXPECT_EQ(done.messages, c.ranks - 1);
    });
  }
}

}  // namespace
}  // namespace dattn::testing
