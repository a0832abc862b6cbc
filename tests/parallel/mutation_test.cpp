// The checker is checked: rehearse() must refuse every mutant of a valid Plan that an independent
// interpreter of Plans finds to go wrong in some order of events.
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "parallel/rehearse.hpp"
#include "tests/cases.hpp"
#include "tests/parallel/interpreter.hpp"
#include "tests/parallel/mutants.hpp"
#include "tests/parallel/plans.hpp"
#include "tests/sanitized.hpp"

namespace dattn {
namespace {

struct Tally {
  int mutants = 0;
  int refused = 0;
  int refused_harmless = 0;  ///< though the interpreter found nothing: rules stricter than need be
};

std::string first_harm(const Problem& problem, const Plan& plan) {
  for (const Weather weather : {Weather::Late, Weather::Early, Weather::Buffered, Weather::Random,
                                Weather::Random, Weather::Random}) {
    static std::uint64_t seed = 1;
    if (auto why = interpret(problem, plan, weather, ++seed); !why.empty()) return why;
  }
  return {};
}

void expect_named(const Fault& fault, const Plan& plan) {
  ASSERT_GE(fault.rank, 0);
  ASSERT_LT(fault.rank, static_cast<int>(plan.size()));
  EXPECT_GE(fault.step, 0) << fault.text();
  EXPECT_LE(fault.step, static_cast<int>(plan[static_cast<std::size_t>(fault.rank)].steps.size()))
      << fault.text();
  EXPECT_EQ(fault.text().find("rank " + std::to_string(fault.rank) + ", step "), 0u);
  if (fault.what.find("computed") != std::string::npos) {
    EXPECT_NE(fault.what.find("pair (h"), std::string::npos) << fault.text();
  }
}

/// Prints what it did; with DATTN_SAMPLES set, also a refused harmless mutant of each kind.
class Mutation : public testing::Test {
 protected:
  /// Of the mutants one in so many is judged, and after one accepted in so many a second mistake
  /// is made. A prime, so that each kind and each rank have their turn.
  struct Sample {
    std::size_t first = 1;
    std::size_t second = 1;
  };
  static constexpr Sample kForward = kSanitized ? Sample{41, 397} : Sample{1, 96};
  static constexpr Sample kBackward = kSanitized ? Sample{127, 1999} : Sample{3, 1920};

  /// The plan of a strategy, and the names by which it is made.
  struct Base {
    std::string_view strategy;
    Mesh mesh;
    std::string_view partition;
    std::string mask;
    Shape shape;
    bool keeps = false;
    int prefetch = 1;
  };
  const Mesh square{{{"ring", 2}, {"heads", 2}}};

  void hold(const Base& base, Pass pass, Sample sample) {
    const Case c{base.shape, base.mask, base.partition, base.strategy, base.mesh};
    const Problem problem = c.problem().keeping(base.keeps).prefetching(base.prefetch);
    const std::string name = pass == Pass::forward ? c.text() : "backward " + c.text();
    hold(problem, make_plan(c.how(), problem, pass), name, sample);
  }

  void hold(const Problem& problem, const Plan& plan, const std::string& name, Sample sample) {
    const Rehearsal valid = rehearse(problem, plan);
    ASSERT_FALSE(valid.fault) << name << ": " << valid.fault->text();
    ASSERT_EQ(first_harm(problem, plan), "") << name;
    std::vector<Plan> accepted;
    each_mutant(plan, [&](const Plan& mutant, const std::string& kind) {
      if (turn_++ % sample.first != 0) return;
      if (judge(problem, mutant, name, kind)) accepted.push_back(mutant);
    });
    // Mistakes upon harmless ones: two mistakes reach states that one does not.
    for (std::size_t i = 0; i < accepted.size(); i += sample.second) {
      each_mutant(accepted[i], [&](const Plan& mutant, const std::string&) {
        if (turn_++ % sample.first == 0) judge(problem, mutant, name, "two mistakes");
      });
    }
  }

 private:
  /// Whether rehearse() takes the mutant.
  bool judge(const Problem& problem, const Plan& mutant, const std::string& name,
             const std::string& kind) {
    Tally& tally = tallies_[kind];
    ++tally.mutants;
    const auto fault = rehearse(problem, mutant).fault;
    const auto harm = first_harm(problem, mutant);
    if (fault) {
      ++tally.refused;
      expect_named(*fault, mutant);
      if (harm.empty()) {
        ++tally.refused_harmless;
        samples_[kind] = name + ": " + fault->text();
      }
    } else if (!harm.empty()) {
      std::string programs;
      for (const Program& p : mutant) programs += text(p);
      ADD_FAILURE() << name << ", " << kind << ": " << harm << ", yet no Fault\n" << programs;
    }
    return !fault;
  }

  void TearDown() override {
    Tally all;
    const auto print = [](const char* kind, const Tally& t) {
      std::printf("  %-26s %6d mutants, %6d refused, %4d of them harmless\n", kind, t.mutants,
                  t.refused, t.refused_harmless);
    };
    for (const auto& [kind, t] : tallies_) {
      print(kind.c_str(), t);
      all.mutants += t.mutants;
      all.refused += t.refused;
      all.refused_harmless += t.refused_harmless;
    }
    print("all", all);
    if (std::getenv("DATTN_SAMPLES") != nullptr) {
      for (const auto& [kind, sample] : samples_) {
        std::printf("  strict on %s: %s\n", kind.c_str(), sample.c_str());
      }
    }
  }

  std::size_t turn_ = 0;
  std::map<std::string, Tally> tallies_;
  std::map<std::string, std::string> samples_;
};

TEST_F(Mutation, OfStrategies) {
  const std::array bases{
      Base{"local", line(1), "contiguous", "causal", {3, 3, 2, 1, 1, 1, 1}},
      Base{"ring", line(2), "contiguous", "full", {5, 5, 1, 1, 1, 1, 1}},
      Base{"ring", line(3), "contiguous", "causal", {7, 7, 2, 1, 1, 1, 1}},
      Base{"ring", line(3), "zigzag", "causal", {8, 8, 2, 2, 1, 1, 1}},
      Base{"ring", line(4), "striped", "window:2,1", {9, 9, 1, 1, 1, 1, 1}},
      Base{"gather", line(3), "zigzag", "causal", {7, 7, 2, 1, 2, 1, 1}},
      Base{"gather", line(4), "contiguous", "window:3,0", {9, 9, 1, 1, 1, 1, 1}},
      Base{"gather", line(3), "contiguous", "causal@0-0;window:1,0@1-1", {7, 7, 2, 2, 2, 1, 1}},
      Base{"gather", line(4), "zigzag", "window:3,0", {9, 9, 1, 1, 1, 1, 1}, false, 2},
      Base{"ring", line(4), "zigzag", "causal", {8, 8, 2, 1, 1, 1, 1}, false, 2},
      Base{"lightseq", line(2), "contiguous", "causal", {6, 6, 2, 2, 1, 1, 1}},
      Base{"lightseq", line(4), "contiguous", "causal", {8, 8, 2, 1, 1, 1, 1}, false, 2},
      Base{"lightseq", line(3), "contiguous", "causal", {7, 7, 2, 1, 1, 1, 1}},
      Base{"lightseq", line(4), "contiguous", "causal", {8, 8, 2, 1, 2, 1, 1}},
      Base{"lightseq", line(5), "contiguous", "causal", {5, 5, 1, 1, 1, 1, 1}},
      Base{"lightseq", line(3), "contiguous", "documents:6,1,1,1+causal", {9, 9, 2, 2, 2, 1, 1}},
      Base{"double_ring", square, "zigzag", "causal", {8, 8, 2, 1, 1, 1, 1}},
      Base{"double_ring",
           Mesh{{{"outer", 3}, {"inner", 2}}},
           "contiguous",
           "full",
           {7, 7, 1, 1, 1, 1, 1}},
      Base{"usp_inner_ring", square, "zigzag", "causal", {8, 8, 2, 1, 2, 1, 1}},
      Base{"ulysses", line(2), "contiguous", "causal", {5, 5, 3, 3, 1, 1, 1}},
      Base{"ulysses", line(3), "zigzag", "causal", {7, 7, 4, 2, 2, 1, 1}, true},
      Base{"ulysses", line(4), "contiguous", "full", {4, 6, 2, 1, 1, 1, 1}},
      Base{"ulysses", line(2), "zigzag", "causal@0-1;window:0,0@2-3", {6, 6, 4, 2, 4, 1, 1}, true},
      Base{"mixed", line(3), "zigzag", "causal@0;window:0,0@1-2", {7, 7, 3, 3, 3, 1, 1}},
      Base{"usp", square, "zigzag", "causal", {8, 8, 2, 1, 2, 1, 1}},
      Base{"usp", square, "contiguous", "prefix:2", {6, 6, 3, 3, 1, 1, 1}, true},
      Base{"tree", line(3), "contiguous", "causal", {2, 7, 2, 1, 1, 1, 1}},
      Base{"tree", line(4), "striped", "full", {3, 9, 2, 2, 1, 1, 1}},
  };
  for (const Base& base : bases) hold(base, Pass::forward, kForward);
}

TEST_F(Mutation, OfBackwardPasses) {
  // Of the rings with one key head in two the keys go around, of the others the queries.
  const std::array bases{
      Base{"local", line(1), "contiguous", "causal", {3, 3, 2, 1, 1, 1, 1}},
      Base{"ring", line(2), "contiguous", "full", {5, 5, 2, 1, 1, 1, 1}},
      Base{"ring", line(4), "zigzag", "causal", {6, 6, 2, 1, 1, 1, 1}},
      Base{"ring", line(3), "contiguous", "causal", {5, 5, 1, 1, 1, 6, 6}},
      Base{"gather", line(3), "contiguous", "causal@0-0;window:1,0@1-1", {7, 7, 2, 2, 2, 1, 1}},
      Base{"gather", line(4), "contiguous", "full", {5, 5, 1, 1, 1, 1, 1}},
      Base{"gather", line(4), "contiguous", "full", {5, 5, 1, 1, 1, 1, 1}, false, 2},
      Base{"lightseq", line(3), "contiguous", "causal", {6, 6, 2, 1, 1, 1, 1}},
      Base{"lightseq", line(3), "contiguous", "documents:6,1,1+causal", {8, 8, 2, 2, 2, 6, 6}},
      Base{"lightseq", line(4), "contiguous", "causal", {4, 4, 2, 2, 1, 1, 1}},
      Base{"double_ring", square, "contiguous", "causal", {4, 4, 2, 1, 1, 1, 1}},
      Base{"ulysses", line(3), "zigzag", "causal", {5, 5, 4, 2, 1, 1, 1}},
      Base{"ulysses", line(3), "zigzag", "causal", {5, 5, 4, 2, 1, 1, 1}, true},
      Base{"usp", square, "contiguous", "prefix:2", {6, 6, 2, 1, 1, 1, 1}},
      Base{"usp_inner_ring", square, "contiguous", "causal", {5, 5, 2, 1, 1, 1, 1}},
      Base{"ulysses", line(2), "zigzag", "causal@0-1;window:0,0@2-3", {5, 5, 4, 2, 4, 1, 1}},
      Base{"mixed", line(2), "zigzag", "causal@0;window:0,0@1-2", {7, 7, 3, 3, 3, 1, 1}},
      Base{"tree", line(3), "contiguous", "causal", {2, 7, 2, 1, 1, 1, 1}},
  };
  for (const Base& base : bases) hold(base, Pass::backward, kBackward);
}

TEST_F(Mutation, OfHandWrittenPlans) {
  const Shape shape{7, 7, 2, 1, 1, 1, 1};
  const Problem helped(shape, parse_mask("causal", shape), line(3), "contiguous");
  hold(helped, helper_plan(helped), "helper", kForward);
  const Shape few{3, 9, 2, 2, 1, 1, 1};
  const Problem twice(few, parse_mask("full", few), {{{"a", 2}, {"b", 2}}}, "contiguous");
  hold(twice, two_reduces(twice), "two reduces", kForward);
}

}  // namespace
}  // namespace dattn
