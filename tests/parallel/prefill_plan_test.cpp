// The plan of a prefill: proved for any stretches at any number of ranks, its bytes those of the
// formula; a schedule with a mistake is refused.
#include "parallel/prefill_plan.hpp"

#include <gtest/gtest.h>

#include <set>

#include "parallel/rehearse.hpp"
#include "tests/parallel/mutants.hpp"
#include "tests/sanitized.hpp"

namespace dattn {
namespace {

constexpr Index kNumbers = 24;  ///< of a token's latent and key

struct Batch {
  Decoding decoding;
  std::vector<Index> lengths;
};

/// Sequences of any lengths, some without tokens, with room between them; shared prefixes, one of
/// which nobody has; fewer tokens than ranks.
std::vector<Batch> batches() {
  const auto of = [](std::vector<Index> capacity, std::vector<PrefixLevel> prefixes,
                     std::vector<Index> lengths) {
    Decoding d{.capacity = std::move(capacity),
               .d_qk = kNumbers,
               .d_v = kNumbers - 4,
               .values_in_keys = true,
               .type = Type::bf16,
               .prefixes = std::move(prefixes)};
    EXPECT_FALSE(complaint(d));
    return Batch{std::move(d), std::move(lengths)};
  };
  return {of({12, 5, 40, 33}, {}, {9, 0, 37, 30}), of({3}, {}, {1}), of({2, 2, 9}, {}, {1, 0, 2}),
          of({4, 9, 2, 5}, {{{0, 4}, {0, 7}}, {{0, 3, 3, 4}, {7, 12, 14, 20}}}, {2, 7, 0, 1}),
          of({3, 3}, {{{0, 2}, {0, 31}}}, {0, 0})};
}

Index tokens_of(const Batch& batch) {
  Index tokens = 0;
  for (const Stretch& s : batch.decoding.stretches(batch.lengths)) tokens += s.keys.size();
  return tokens;
}

/// Pairs of a token and one that it sees, from what the cache says of each.
Index pairs_of(const Batch& batch) {
  Index pairs = 0;
  const std::vector<Stretch> all = batch.decoding.stretches(batch.lengths);
  for (const Stretch& s : all) {
    for (Index i = 0; i < s.keys.size(); ++i) pairs += s.before + i + 1;
  }
  return pairs;
}

TEST(PrefillPlan, StandsForAnyStretchesAtAnyNumberOfRanks) {
  for (const Batch& batch : batches()) {
    const Index tokens = tokens_of(batch);
    for (int ranks = 1; ranks <= 16; ++ranks) {
      for (const bool keeps : {false, true}) {
        for (const char* words : {"1", "0,1,0,1"}) {
          if (words != std::string_view("1") && ranks != 4) continue;
          const Hosts hosts = parse_hosts(words, ranks);
          const Problem problem =
              prefill_problem(batch.decoding, batch.lengths, kNumbers, ranks, hosts);
          const Plan plan = prefill_plan(problem, keeps);
          const Rehearsal proof = rehearse(problem, plan);
          ASSERT_FALSE(proof.fault) << proof.fault->text();
          EXPECT_EQ(proof.pairs_total(), pairs_of(batch));
          EXPECT_EQ(proof.bytes_sent_total(), (ranks - 1) * tokens * kNumbers * 2);
          if (hosts.count() == 2) {  // one link of the ring leaves each host
            EXPECT_LE(proof.bytes_between_hosts(), 2 * tokens * kNumbers * 2);
          }
          // Each rank has what the cache deals it.
          for (int r = 0; r < ranks; ++r) {
            Index own = 0;
            for (const Stretch& s : batch.decoding.stretches(batch.lengths)) {
              for (Index p = s.keys.begin; p < s.keys.end; ++p) own += p % ranks == r;
            }
            EXPECT_EQ(problem.keys().rows(r).size(), own);
          }
        }
      }
    }
  }
}

// If latents are kept each has a home of its own, so that Attends may be repeated.
TEST(PrefillPlan, KeepsWhatComes) {
  const Batch batch = batches().front();
  const Problem problem = prefill_problem(batch.decoding, batch.lengths, kNumbers, 5, {});
  for (const Program& program : prefill_plan(problem, true)) {
    std::set<int> homes;
    for (const Step& step : program.steps) {
      const auto* attend = std::get_if<Attend>(&step);
      if (attend == nullptr) continue;
      homes.insert(program.slots[static_cast<std::size_t>(attend->k)].home);
      for (const Slot& slot : program.slots) {
        const Slot& k = program.slots[static_cast<std::size_t>(attend->k)];
        EXPECT_TRUE(&slot == &k || slot.home != k.home);
      }
    }
    EXPECT_EQ(homes.size(), 5u);
  }
  EXPECT_EQ(prefill_plan(problem, false).front().homes, 4 + 2);
}

TEST(PrefillPlan, IsRefusedWithAMistake) {
  // What is a legal order as well, what moves nothing else, or is the same: V is K.
  const std::set<std::string> may_be_harmless{"swap neighbours", "swap k and v", "other home",
                                              "bend a slot"};
  // And of a rank without tokens, what is nothing as well.
  const std::set<std::string> may_be_nothing{"bend delivers", "exchange delivers",
                                             "other input or result"};
  for (const Batch& batch : batches()) {
    for (const int ranks : {2, 3, 5}) {
      if (kSanitized && ranks > 3) continue;
      for (const bool keeps : {false, true}) {
        const Problem problem = prefill_problem(batch.decoding, batch.lengths, kNumbers, ranks, {});
        bool all_have_some = true;
        for (int r = 0; r < ranks; ++r) all_have_some &= !problem.keys().rows(r).empty();
        int refused = 0;
        each_mutant(prefill_plan(problem, keeps), [&](const Plan& plan, const std::string& kind) {
          if (rehearse(problem, plan).fault) {
            ++refused;
          } else {
            EXPECT_TRUE(may_be_harmless.contains(kind) ||
                        (!all_have_some && may_be_nothing.contains(kind)))
                << kind << " at " << ranks << " ranks";
          }
        });
        EXPECT_GT(refused, 10 * ranks);
      }
    }
  }
}

TEST(PrefillPlan, AttendsToKeysWithoutValuesOnlyWhereTheseLieInThem) {
  const Batch batch = batches().front();
  const Problem problem = prefill_problem(batch.decoding, batch.lengths, kNumbers, 2, {});
  const Plan plan = prefill_plan(problem, true);
  const Problem other(problem.shape(), problem.mask_ptr(), problem.mesh(), "striped",
                      problem.type());
  const Rehearsal refused = rehearse(other.dealt(problem.keys()), plan);
  ASSERT_TRUE(refused.fault);
  EXPECT_NE(refused.fault->text().find("where Q, K, V, O are due"), std::string::npos);
}

}  // namespace
}  // namespace dattn
