// How even the schedule of lightseq is, and what it looks like where it can be said by hand.
#include "parallel/schedule.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <random>

#include "parallel/rehearse.hpp"
#include "tests/cases.hpp"

namespace dattn {
namespace {

/// What a mean rank computes over what the most loaded one does: pairs / (ranks x most pairs).
double evenness(const Problem& problem) {
  const Schedule& schedule = problem.schedule();
  return static_cast<double>(schedule.total()) /
         (static_cast<double>(problem.ranks()) * static_cast<double>(schedule.most()));
}

/// The ideal time (one rank's kernel on 1/P of the pairs) over the forecast of lightseq's plan with
/// messages and steps that take no time.
double free_network_efficiency(const Problem& problem) {
  const Machine free{0, 1e300, 1e9, 0};
  const Rehearsal found = rehearse(problem, make_plan(*find_strategy("lightseq"), problem), free);
  EXPECT_FALSE(found.fault) << found.fault->text();
  const double ideal = static_cast<double>(found.pairs_total()) * problem.shape().flops_per_pair() /
                       free.rate / problem.ranks();
  return ideal / found.forecast_seconds();
}

/// Lengths of packed documents as in pre-training data: log-normal with a long tail (sigma 1.3, the
/// longest hundreds of times the shortest).
std::string documents(Index tokens, double median, unsigned seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<double> normal;
  std::string words = "documents:";
  while (tokens > 0) {
    const double length = median * std::exp(1.3 * normal(bits));
    const Index next = std::min(tokens, std::max<Index>(1, std::llround(length)));
    tokens -= next;
    words += std::to_string(next) + (tokens > 0 ? "," : "+causal");
  }
  return words;
}

const Heads kEven[] = {{4, 4, 4}, {8, 2, 2}, {5, 1, 1}, {6, 3, 2}};

TEST(EvenSchedule, OfCausalIsNearIdealAtEveryP) {
  for (int ranks = 2; ranks <= 16; ++ranks) {
    double least[2] = {1, 1};
    for (const Heads heads : kEven) {
      for (const Index tokens : {128 * ranks, 128 * ranks + 5}) {
        const Shape shape = shape_of({tokens, tokens}, heads);
        const Problem problem(shape, parse_mask("causal", shape), line(ranks), "contiguous");
        least[0] = std::min(least[0], evenness(problem));
        least[1] = std::min(least[1], free_network_efficiency(problem));
      }
    }
    std::printf("  causal, %2d ranks: evenness %.4f, free network %.4f\n", ranks, least[0],
                least[1]);
    EXPECT_GE(least[0], 0.99) << ranks;
    EXPECT_GE(least[1], 0.99) << ranks;
  }
}

TEST(EvenSchedule, OfDocumentsIsNearIdealAtEveryP) {
  for (int ranks = 2; ranks <= 16; ++ranks) {
    double least[2] = {1, 1};
    double own = 1;
    for (unsigned seed = 0; seed < 4; ++seed) {
      const Index tokens = 512 * ranks;
      const Shape shape = shape_of({tokens, tokens}, kEven[seed % 2]);
      const MaskPtr mask = parse_mask(documents(tokens, 100, seed), shape);
      const Problem problem(shape, mask, line(ranks), "contiguous");
      least[0] = std::min(least[0], evenness(problem));
      least[1] = std::min(least[1], free_network_efficiency(problem));
      const Rehearsal gather = rehearse(problem, make_plan(*find_strategy("gather"), problem));
      own = std::min(own, static_cast<double>(gather.pairs_total()) / ranks /
                              static_cast<double>(
                                  *std::max_element(gather.pairs.begin(), gather.pairs.end())));
    }
    std::printf("  documents, %2d ranks: evenness %.4f, free network %.4f (no help: %.4f)\n", ranks,
                least[0], least[1], own);
    EXPECT_GE(least[0], 0.97) << ranks;
    EXPECT_GE(least[1], 0.97) << ranks;
  }
}

}  // namespace
}  // namespace dattn
