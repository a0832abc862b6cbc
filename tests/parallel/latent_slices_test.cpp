// Latent attention with a latent that is cut, over threads, against the layer in double.
#include "parallel/latent_slices.hpp"

#include <array>
#include <cmath>
#include <mutex>

#include "kernels/latent/basis.hpp"
#include "kernels/latent/reference.hpp"
#include "tests/parallel/on_all_ranks.hpp"

namespace dattn::testing {
namespace {

constexpr Index kSteps = 2;

LatentSizes small() {
  return {
      .model = 48, .heads = 6, .q_rank = 20, .kv_rank = 32, .d_nope = 10, .d_rope = 6, .d_v = 8};
}

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

/// The relative error of y over two steps, on every rank the same.
double error_of(const LatentSizes& sizes, const Slicing& slicing, int ranks, Type type,
                Index each = 1, double decay = 0) {
  EXPECT_FALSE(complaint(slicing, sizes, ranks));
  const Decoding d = latent_decoding(sizes, {20 + kSteps * each, 1200}, each, type);
  const auto make = [&](Range heads) {
    LatentPart part = whole(sizes);
    part.heads = heads;
    return decaying(random_weights(sizes, part, 7), decay);
  };
  std::vector<double> errors(static_cast<std::size_t>(ranks), -1);
  on_all_ranks(ranks, {"delayed", false, 2}, 3, [&](comm::Loopback::Endpoint& end) {
    const Index known = 200;
    std::vector<float> calibration(static_cast<std::size_t>(known * sizes.model));
    hidden_of(sizes, 9, {{0, known, 1}}, calibration.data());
    SlicedDecoder<comm::Loopback::Endpoint> layer(
        sizes, make, d, slicing, {calibration.data(), known, 1, sizes.model}, end, {});
    const Hidden hidden = [&](std::size_t s, const Runs& tokens, float* x) {
      hidden_of(sizes, s, tokens, x);
    };
    std::vector<Index> lengths{20, 1100};
    layer.fill(lengths, hidden);
    const LatentWeights judge = make({0, sizes.heads});
    double error = 0;
    double norm = 0;
    for (int step = 0; step < kSteps; ++step) {
      const auto count = static_cast<std::size_t>(each * sizes.model);
      std::vector<float> x(2 * count), y(2 * count);
      for (std::size_t s = 0; s < 2; ++s) {
        hidden(s, {{lengths[s], each, 1}}, &x[s * count]);
        lengths[s] += each;
      }
      layer.step(lengths, {x.data(), 2 * each, 1, sizes.model}, y);
      if (end.rank() > 0) continue;
      for (std::size_t s = 0; s < 2; ++s) {
        std::vector<float> all(static_cast<std::size_t>(lengths[s] * sizes.model));
        hidden(s, {{0, lengths[s], 1}}, all.data());
        const auto want = latent_reference(judge, {all.data(), lengths[s], 1, sizes.model}, each);
        for (std::size_t i = 0; i < want.size(); ++i) {
          const double off = static_cast<double>(y[s * count + i]) - want[i];
          error += off * off;
          norm += want[i] * want[i];
        }
      }
    }
    if (end.rank() == 0) errors[0] = std::sqrt(error / norm);
    const Index slice = layer.part().latent.size() + sizes.d_rope;
    EXPECT_EQ(layer.cache_bytes(lengths), (lengths[0] + lengths[1]) * slice * bytes_of(type));
  });
  return errors[0];
}

TEST(LatentSlices, AreExactWhereScoresAreAddedUp) {
  const LatentSizes sizes = small();
  for (const auto& [ranks, slices] :
       {std::pair{1, 1}, {2, 2}, {3, 3}, {4, 2}, {5, 5}, {6, 3}, {7, 7}, {8, 4}, {8, 8}}) {
    for (const Type type : {Type::f4, Type::bf16}) {
      for (const auto basis : {Slicing::Basis::none, Slicing::Basis::hadamard}) {
        const Slicing slicing{.slices = slices, .basis = basis};
        const double error = error_of(sizes, slicing, ranks, type, ranks % 2 == 0 ? 1 : 3);
        EXPECT_LE(error, type == Type::bf16 ? 8e-3 : 1e-5)
            << ranks << " ranks, " << slices << " slices, " << name_of(type);
      }
    }
  }
  EXPECT_LE(error_of(sizes, {.slices = 2, .basis = Slicing::Basis::pca}, 2, Type::f4), 1e-5);
}

TEST(LatentSlices, OfOneSliceAreExactWithTheirOwnSoftmax) {
  for (const int ranks : {1, 2, 3, 4}) {
    for (const auto norm : {Slicing::Norm::exact, Slicing::Norm::slice}) {
      EXPECT_LE(error_of(small(), {.slices = 1, .exact = false, .norm = norm}, ranks, Type::f4),
                1e-5)
          << ranks;
    }
  }
}

// What TPLA loses: some, and less in a basis that knows the latents. Where the weights have a
// decaying spectrum principal components keep nearly all in one slice.
TEST(LatentSlices, LoseByASoftmaxOfTheirOwn) {
  std::array<std::array<double, 3>, 2> errors{};
  std::printf("relative error of y against the exact layer, 2 slices:\n");
  for (const double decay : {0.0, 1.0}) {
    for (const auto basis : {Slicing::Basis::none, Slicing::Basis::hadamard, Slicing::Basis::pca}) {
      for (const auto norm : {Slicing::Norm::exact, Slicing::Norm::slice}) {
        for (const auto factor :
             {Slicing::Factor::one, Slicing::Factor::energy, Slicing::Factor::fitted}) {
          const Slicing slicing{2, false, basis, norm, factor};
          const double error = error_of(small(), slicing, 2, Type::f4, 1, decay);
          std::printf("  spectrum %.0f, basis %d, norm %d, factor %d: %.4f\n", decay,
                      static_cast<int>(basis), static_cast<int>(norm), static_cast<int>(factor),
                      error);
          EXPECT_GT(error, 1e-4);
          EXPECT_LT(error, 2);
          if (norm == Slicing::Norm::exact && factor == Slicing::Factor::fitted) {
            errors[decay > 0][static_cast<std::size_t>(basis)] = error;
          }
        }
      }
    }
  }
  const auto pca = static_cast<std::size_t>(Slicing::Basis::pca);
  EXPECT_LT(errors[1][pca], 0.3 * errors[1][0]);
  EXPECT_LT(errors[1][pca], 0.3 * errors[0][pca]);
}

TEST(LatentSlices, SayWhatTheyCannotCut) {
  LatentSizes sizes = small();
  EXPECT_NE(complaint({.slices = 2}, sizes, 3).value_or("").find("do not divide 3"),
            std::string::npos);
  EXPECT_NE(complaint({.slices = 33}, sizes, 33).value_or("").find("kv_rank = 32"),
            std::string::npos);
  sizes.kv_rank = 24;
  EXPECT_NE(
      complaint({.slices = 2, .basis = Slicing::Basis::hadamard}, sizes, 2).value_or("").find("24"),
      std::string::npos);
}

}  // namespace
}  // namespace dattn::testing
