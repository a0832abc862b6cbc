#include "parallel/kernel_work.hpp"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"

namespace dattn {
namespace {

constexpr Index kAll = 1 << 20;  // samples: every group of rows

Shape shape_of(Index tokens) { return {tokens, tokens, 8, 2, 2, 64, 64}; }

std::vector<Index> positions_of(const Runs& runs) {
  std::vector<Index> all;
  for (const Run& run : runs) {
    for (Index i = 0; i < run.count; ++i) all.push_back(run.at(i));
  }
  return all;
}

/// Piece by piece, asking the mask about each pair.
Extra by_hand(const Mask& mask, const std::vector<Index>& queries, const std::vector<Index>& keys,
              std::size_t together, std::size_t granule) {
  Extra sum;
  for (std::size_t first = 0; first < queries.size(); first += together) {
    const std::size_t end = std::min(first + together, queries.size());
    for (std::size_t key = 0; key < keys.size(); key += granule) {
      const std::size_t last = std::min(key + granule, keys.size());
      Index allowed = 0;
      for (std::size_t q = first; q < end; ++q) {
        for (std::size_t k = key; k < last; ++k) allowed += mask.allows(0, queries[q], keys[k]);
      }
      const auto all = static_cast<Index>((end - first) * (last - key));
      if (allowed == 0) continue;
      sum.beside += static_cast<double>(all - allowed);
      if (allowed < all) sum.masked += static_cast<double>(all);
    }
  }
  return sum;
}

TEST(KernelWork, IsWhatPiecesOfTheMaskSay) {
  constexpr Index kTokens = 210;
  const Shape shape = shape_of(kTokens);
  const std::vector<Runs> some{{{0, kTokens, 1}},
                               {{35, 60, 1}},
                               {{0, 35, 1}, {175, 35, 1}},  // zigzag
                               {{1, 70, 3}},                // striped
                               {{8, 8, 1}, {40, 8, 1}, {96, 17, 1}}};
  for (const std::string words : {"full", "causal", "window:20,0", "documents:50,7,100,53+causal",
                                  "stream:sink=9,recent=30", "s2:block=16,local=2,stride=3"}) {
    const MaskPtr mask = parse_mask(words, shape);
    for (const Runs& queries : some) {
      for (const Runs& keys : some) {
        for (const Index heads : {1, 4}) {
          for (const Index granule : {6, 12}) {
            const Extra found = extra_pairs(*mask, 0, queries, keys, {16, granule}, heads, kAll);
            const Extra due =
                by_hand(*mask, positions_of(queries), positions_of(keys),
                        static_cast<std::size_t>(16 / heads), static_cast<std::size_t>(granule));
            ASSERT_EQ(found.beside, due.beside) << words << " " << heads << " " << granule;
            ASSERT_EQ(found.masked, due.masked) << words << " " << heads << " " << granule;
          }
        }
      }
    }
  }
}

// Rows of one residue share registers: nothing is computed beside a dilated mask but at its ends.
TEST(KernelWork, TakesResiduesOneByOne) {
  constexpr Index kStep = 4;
  const Shape shape = shape_of(384);
  const MaskPtr mask = parse_mask("dilated:12,0,4", shape);
  // All positions, and every second one, as of a striped partition: two of the residues.
  for (const Index every : {1, 2}) {
    const Runs some{{every - 1, 384 / every, every}};
    const Extra found = extra_pairs(*mask, 0, some, some, {16, 6}, 4, kAll);
    Extra due;
    for (Index residue = every - 1; residue < kStep; residue += every) {
      const std::vector<Index> own = positions_of({{residue, 384 / kStep, kStep}});
      const Extra one = by_hand(*mask, own, own, 4, 6);
      due.beside += one.beside;
      due.masked += one.masked;
    }
    EXPECT_EQ(found.beside, due.beside) << every;
    EXPECT_EQ(found.masked, due.masked) << every;
  }
  // Too many small calls: rows and keys are taken as they lie.
  Runs scattered;
  for (Index i = 0; i < 24; ++i) scattered.push_back({16 * i, 8, 1});
  const std::vector<Index> all = positions_of(scattered);
  EXPECT_EQ(extra_pairs(*mask, 0, scattered, scattered, {16, 6}, 4, kAll).beside,
            by_hand(*mask, all, all, 4, 6).beside);
}

TEST(KernelWork, GrowsWithWhatIsTakenTogether) {
  const Shape shape = shape_of(1000);
  const Runs all{{0, 1000, 1}};
  for (const char* words : {"causal", "window:100,0", "stream:sink=10,recent=50"}) {
    const MaskPtr mask = parse_mask(words, shape);
    double before = 0;
    for (const Index lanes : {1, 4, 16, 64}) {
      const double beside = extra_pairs(*mask, 0, all, all, {lanes, 1}, 1, kAll).beside;
      EXPECT_GE(beside, before) << words << " " << lanes;
      before = beside;
    }
    EXPECT_GT(before, 0);
    EXPECT_EQ(extra_pairs(*mask, 0, all, all, {0, 6}, 1, kAll).beside, 0) << words;
  }
}

TEST(KernelWork, OfSomeRowsStandsForAll) {
  const Shape shape = shape_of(4096);
  const Runs all{{0, 4096, 1}};
  for (const char* words : {"causal", "window:511,0", "documents:1000,96,2000,1000+causal"}) {
    const MaskPtr mask = parse_mask(words, shape);
    const Extra exact = extra_pairs(*mask, 0, all, all, {16, 6}, 4, kAll);
    const Extra some = extra_pairs(*mask, 0, all, all, {16, 6}, 4, 16);
    EXPECT_NEAR(some.beside, exact.beside, 0.25 * exact.beside) << words;
    EXPECT_NEAR(some.masked, exact.masked, 0.25 * exact.masked) << words;
  }
}

double compute_seconds(const std::string& words, const std::string& partition,
                       const Machine& machine, Pass pass = Pass::forward) {
  const Shape shape = shape_of(1024);
  const Problem problem(shape, parse_mask(words, shape), line(4), partition);
  const Rehearsal found =
      rehearse(problem, make_plan(*find_strategy("gather"), problem, pass), machine);
  double sum = 0;
  for (const double seconds : found.compute_seconds) sum += seconds;
  return sum;
}

TEST(KernelWork, PricesWhatPartitionsCutApart) {
  const Machine area{.latency = 0, .bandwidth = 1e12, .rate = 1e9, .overhead = 0};
  const Machine cut = parse_machine("lanes=16,granule=6", area);
  EXPECT_DOUBLE_EQ(compute_seconds("full", "striped", cut),
                   compute_seconds("full", "striped", area));
  EXPECT_GT(compute_seconds("full", "zigzag", cut), compute_seconds("full", "zigzag", area));
  const std::string documents = "documents:100,30,300,50,544+causal";
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const double dense = compute_seconds(documents, "contiguous", cut, pass);
    EXPECT_GT(dense, compute_seconds(documents, "contiguous", area, pass));
    EXPECT_GT(compute_seconds(documents, "striped", cut, pass), 1.1 * dense);
    EXPECT_DOUBLE_EQ(compute_seconds(documents, "striped", area, pass),
                     compute_seconds(documents, "contiguous", area, pass));
  }
}

TEST(KernelWork, KeyRowsHaveARateOfTheirOwn) {
  const Machine rows{.latency = 0, .bandwidth = 1e12, .rate = 1e15, .overhead = 0, .rows = 1e9};
  const Machine keys = parse_machine("packs=1e8", rows);
  const double more =
      compute_seconds("full", "contiguous", keys) - compute_seconds("full", "contiguous", rows);
  // Each of four ranks reads all keys of two heads.
  EXPECT_NEAR(more, 4 * 1024.0 * 2 * 128 * 4 * (1 / 1e8 - 1 / 1e9), 1e-6);
}

TEST(KernelWork, IsReadAndWrittenAsAMachine) {
  const Machine machine = parse_machine("rows=1e9,packs=2e8,lanes=16,granule=12");
  const Machine again = parse_machine(machine.text());
  EXPECT_EQ(again.packs, 2e8);
  EXPECT_EQ(again.grain().lanes, 16);
  EXPECT_EQ(again.grain().granule, 12);
  for (const char* wrong : {"lanes=1.5", "lanes=0", "granule=0", "granule=1e9", "packs=-1"}) {
    EXPECT_THROW(parse_machine(wrong), std::invalid_argument) << wrong;
  }
}

}  // namespace
}  // namespace dattn
