// Latent attention with a latent that is cut, over threads, against the layer in double.
#include "parallel/latent_slices.hpp"

#include <array>
#include <cmath>
#include <mutex>

#include "kernels/latent/basis.hpp"
#include "kernels/latent/reference.hpp"
#include "parallel/latent_prefill.hpp"
#include "parallel/latent_scores.hpp"
#include "tests/parallel/on_all_ranks.hpp"
#include "tests/sanitized.hpp"

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

/// Sequences that share 300 tokens, the first three 5 more and the last 8; or, flat, with these for
/// themselves.
class Tree {
 public:
  static constexpr Index kNew = 2;
  static constexpr std::size_t kSequences = 4;

  Tree(Type type, bool is_flat) : is_flat_(is_flat) {
    std::vector<Index> capacity;
    for (std::size_t s = 0; s < kSequences; ++s) capacity.push_back(start()[s] + kSteps * kNew);
    decoding = latent_decoding(small(), std::move(capacity), kNew, type);
    if (!is_flat) decoding.prefixes = {{{0, 4}, {0, 300}}, {{0, 3, 4}, {300, 305, 313}}};
    EXPECT_FALSE(complaint(decoding));
  }

  static Index shared(std::size_t s) { return s < 3 ? 305 : 308; }
  /// What is in the cache before the first step: of the sequence's own, or with what is shared.
  std::vector<Index> start() const {
    std::vector<Index> lengths{2, 7, 0, 1};
    for (std::size_t s = 0; is_flat_ && s < lengths.size(); ++s) lengths[s] += shared(s);
    return lengths;
  }
  /// Tokens of a sequence with these of its own.
  Index tokens(std::size_t s, Index length) const { return length + (is_flat_ ? 0 : shared(s)); }

  static void hidden(std::size_t s, const Runs& tokens, float* x) {
    for (const dattn::Run& run : tokens) {
      for (Index i = 0; i < run.count; ++i, x += small().model) {
        const Index token = run.at(i);
        const std::size_t whose = token < 300         ? 9
                                  : token < shared(s) ? (s < 3 ? std::size_t{10} : 11)
                                                      : s;  // a prefix has numbers of its own
        hidden_of(small(), whose, {{token, 1, 1}}, x);
      }
    }
  }

  Decoding decoding;

 private:
  bool is_flat_;
};

/// y of all steps and the LSE of the last one of rank 0; with `prefills` the cache comes of a
/// prefill, and is that which is filled.
std::pair<std::vector<float>, std::vector<float>> decoded(const Tree& tree, const Slicing& slicing,
                                                          int ranks, bool prefills = false) {
  using End = comm::Loopback::Endpoint;
  const LatentSizes sizes = small();
  const auto make = [&](Range heads) {
    LatentPart part = whole(sizes);
    part.heads = heads;
    return random_weights(sizes, part, 7);
  };
  std::pair<std::vector<float>, std::vector<float>> found;
  on_all_ranks(ranks, {"delayed", false, 2}, 3, [&](End& end) {
    std::vector<float> calibration(static_cast<std::size_t>(64 * sizes.model));
    hidden_of(sizes, 9, {{0, 64, 1}}, calibration.data());
    const View<const float> known{calibration.data(), 64, 1, sizes.model};
    SlicedDecoder<End> layer(sizes, make, tree.decoding, slicing, known, end, {});
    std::vector<Index> lengths = tree.start();
    layer.fill(lengths, Tree::hidden);
    if (prefills) {
      LatentPrefill<End> prefill(sizes, in_basis(make({0, sizes.heads}), slicing, known, {}),
                                 tree.decoding, lengths, end, {});
      prefill.make(Tree::hidden);
      prefill.run();
      SlicedDecoder<End> taken(sizes, make, tree.decoding, slicing, known, end, {});
      taken.take(prefill.rows(), lengths);
      for (const Stretch& stretch : tree.decoding.stretches(lengths)) {
        const auto got = taken.cached(stretch.keys);
        const auto direct = layer.cached(stretch.keys);
        EXPECT_TRUE(std::equal(got.begin(), got.end(), direct.begin(), direct.end()));
      }
    }
    const auto part = static_cast<std::size_t>(Tree::kNew * sizes.model);
    for (int step = 0; step < kSteps; ++step) {
      std::vector<float> x(Tree::kSequences * part), y(x.size());
      for (std::size_t s = 0; s < Tree::kSequences; ++s) {
        Tree::hidden(s, {{tree.tokens(s, lengths[s]), Tree::kNew, 1}}, &x[s * part]);
        lengths[s] += Tree::kNew;
      }
      const Index rows = Tree::kNew * static_cast<Index>(Tree::kSequences);
      layer.step(lengths, {x.data(), rows, 1, sizes.model}, y);
      if (end.rank() == 0) found.first.insert(found.first.end(), y.begin(), y.end());
    }
    const Index slice = layer.part().latent.size() + sizes.d_rope;
    Index tokens = tree.decoding.shared();
    for (const Index length : lengths) tokens += length;
    EXPECT_EQ(layer.cache_bytes(lengths), tokens * slice * bytes_of(tree.decoding.type));
    if (end.rank() == 0) found.second.assign(layer.lse().begin(), layer.lse().end());
  });
  return found;
}

template <class E>
double off(const std::vector<float>& got, const std::vector<E>& want) {
  double error = 0;
  double norm = 0;
  EXPECT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < want.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - static_cast<double>(want[i]), 2);
    norm += std::pow(static_cast<double>(want[i]), 2);
  }
  return std::sqrt(error / norm);
}

// Each prefix is cached once and met by all who share it, and nothing is different for that: not
// from the layer in double where scores are added up, nor, whatever the slices do, from the same
// sequences each with all of its tokens.
TEST(LatentSlices, SharePrefixes) {
  const LatentSizes sizes = small();
  LatentPart all = whole(sizes);
  const LatentWeights judge = random_weights(sizes, all, 7);
  std::vector<double> want;
  std::vector<Index> lengths{2, 7, 0, 1};
  for (int step = 0; step < kSteps; ++step) {
    for (std::size_t s = 0; s < Tree::kSequences; ++s) {
      lengths[s] += Tree::kNew;
      const Index tokens = Tree::shared(s) + lengths[s];
      std::vector<float> x(static_cast<std::size_t>(tokens * sizes.model));
      Tree::hidden(s, {{0, tokens, 1}}, x.data());
      const auto y = latent_reference(judge, {x.data(), tokens, 1, sizes.model}, Tree::kNew);
      want.insert(want.end(), y.begin(), y.end());
    }
  }
  struct Case {
    int ranks;
    Slicing slicing;
    Type type = Type::f4;
  };
  using Basis = Slicing::Basis;
  const auto norm = Slicing::Norm::slice;
  for (const Case& c :
       {Case{1, {.slices = 1, .exact = false}},
        Case{2, {.slices = 2, .exact = false, .basis = Basis::pca}},
        Case{3, {.slices = 3, .exact = false, .norm = norm}},
        Case{4, {.slices = 2, .exact = false}, Type::bf16}, Case{8, {.slices = 4, .exact = false}},
        Case{1, {.slices = 1}}, Case{3, {.slices = 3, .basis = Basis::none}},
        Case{4, {.slices = 2, .basis = Basis::hadamard}, Type::bf16}, Case{5, {.slices = 5}},
        Case{7, {.slices = 7}}, Case{8, {.slices = 4}}}) {
    if (kSanitized && c.ranks > 4) continue;
    const bool prefills = c.ranks == 2 || c.ranks == 3;
    const bool knows_whole = c.slicing.norm == Slicing::Norm::exact;  // as a prefill does
    const auto [y, lse] = decoded(Tree(c.type, false), c.slicing, c.ranks, prefills && knows_whole);
    const auto [flat_y, flat_lse] = decoded(Tree(c.type, true), c.slicing, c.ranks);
    const auto what = [&] {
      return std::to_string(c.ranks) + " ranks, " + std::to_string(c.slicing.slices) +
             (c.slicing.exact ? " slices" : " slices by themselves");
    };
    // What slices of bfloat16 round is the same numbers, and O in another order.
    EXPECT_LE(off(y, flat_y), c.type == Type::bf16 ? 1e-3 : 1e-5) << what();
    EXPECT_EQ(lse.empty(), !c.slicing.exact) << what();
    EXPECT_LE(lse.empty() ? 0 : off(lse, flat_lse), 1e-5) << what();
    if (!c.slicing.exact && c.slicing.slices > 1) continue;
    EXPECT_LE(off(y, want), c.type == Type::bf16 ? 8e-3 : 1e-5) << what();
  }
}

// Messages of scores: all keys of all stretches in order, none of more scores than 2^18 or, of many
// rows, than those of 256 keys.
TEST(LatentSlices, SendScoresInMessagesOfSomeSize) {
  Decoding d = latent_decoding(small(), {1000, 3, 40, 2000, 7, 300}, 2, Type::f4);
  d.prefixes = {{{0, 6}, {0, 5000}}, {{0, 1, 1, 6}, {5000, 5001, 5040, 9000}}};
  const std::vector<Stretch> stretches = d.stretches(d.capacity);
  for (const Index heads : {1, 6, 16, 128, 1000}) {
    const std::vector<ScoreBatch> batches = score_batches(stretches, d.queries, heads);
    std::size_t stretch = 0;
    Index key = stretches[0].keys.begin;
    Index scores = 0;
    for (const ScoreBatch& batch : batches) {
      Index first = 0;
      for (const ScorePiece& piece : batch.pieces) {
        while (key == stretches[stretch].keys.end) key = stretches[++stretch].keys.begin;
        EXPECT_EQ(piece.stretch, stretch);
        EXPECT_EQ(piece.keys.begin, key);
        EXPECT_FALSE(piece.keys.empty());
        EXPECT_EQ(piece.first, first);
        key = piece.keys.end;
        first += piece.keys.size() * rows_of(stretches[stretch], d.queries).size() * heads;
      }
      EXPECT_EQ(batch.scores, first);
      EXPECT_LE(batch.scores, most_scores(d, heads));
      EXPECT_LE(batch.scores, std::max<Index>(1 << 18, 12 * heads * 256));
      scores += first;
    }
    EXPECT_EQ(key, stretches.back().keys.end);
    EXPECT_EQ(stretch, stretches.size() - 1);
    const Index tokens = 12 * 5000 + 2 * 1 + 10 * 3960 + 2 * (1000 + 3 + 40 + 2000 + 7 + 300);
    EXPECT_EQ(scores, tokens * heads);
    EXPECT_LE(std::ssize(batches), 2 + 2 * scores / (1 << 18)) << heads;
  }
  EXPECT_TRUE(score_batches(stretches, d.queries, 0).empty());
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
