// The table of cases, rehearsed: every strategy x partition x mask x ranks is proved right.
#include <gtest/gtest.h>

#include <map>

#include "kernels/area.hpp"
#include "parallel/passes.hpp"
#include "tests/cases.hpp"
#include "tests/parallel/interpreter.hpp"
#include "tests/sanitized.hpp"

namespace dattn {
namespace {

Index brute_force_pairs(const Problem& problem) {
  const Shape& s = problem.shape();
  Index count = 0;
  for (Index h = 0; h < s.query_heads; ++h) {
    for (Index q = s.first_query(); q < s.keys; ++q) {
      for (Index k = 0; k < s.keys; ++k) count += problem.mask().allows(h, q, k) ? 1 : 0;
    }
  }
  return count;
}

constexpr Pass kPasses[] = {Pass::forward, Pass::backward};
constexpr std::size_t kCoarser = kSanitized ? 47 : 1;

class PlanTable : public testing::TestWithParam<int> {
 protected:
  /// How many plans were right.
  std::size_t check(const std::vector<Case>& cases) {
    for (const Case& c : cases) {
      const Problem problem = c.problem();
      check(c, problem);
      const Problem keeping = problem.keeping(true);
      if (!make_program(c.how(), keeping, 0, Pass::forward).kept.empty()) check(c, keeping);
    }
    return cases.size();
  }

  std::map<std::pair<Shape, std::string>, Index> pairs_;

 private:
  void check(const Case& c, const Problem& problem) {
    SCOPED_TRACE(problem.keeps() ? "keeping" : "sending again");
    for (const Planned& pass : plan_passes(c.how(), problem, kPasses)) {
      SCOPED_TRACE(name_of(pass.plan.front().pass));
      check(c, pass.rehearsal);
    }
  }

  void check(const Case& c, const Rehearsal& found) {
    ASSERT_FALSE(found.fault) << c.text() << ": " << found.fault->text();
    auto [pairs, fresh] = pairs_.try_emplace({c.shape, c.mask}, 0);
    if (fresh) pairs->second = brute_force_pairs(c.problem());
    EXPECT_EQ(found.pairs_total(), pairs->second) << c.text();
    for (const Index bytes : found.memory_bytes) EXPECT_GE(bytes, 0) << c.text();
    EXPECT_GT(found.memory_bytes[0] + found.memory_bytes.back(), 0) << c.text();
    if (c.strategy == "gather" || c.strategy == "lightseq") {
      EXPECT_TRUE(found.dead.empty()) << c.text() << ": rank " << found.dead.front().first
                                      << ", step " << found.dead.front().second << " does nothing";
    }
    if (c.ranks() == 1) {
      EXPECT_EQ(found.bytes_sent_total(), 0) << c.text();
    }
  }
};

TEST_P(PlanTable, Rehearses) {
  const int ranks = GetParam();
  // Every shape for every combination where it is cheap; one in eleven elsewhere.
  const std::size_t stride = ranks <= 4 ? kCoarser : kSanitized ? 331 : 11;
  EXPECT_GT(check(cases(ranks, stride)), 0u);
  EXPECT_GT(check(wire_cases(ranks)), 0u);
}

TEST_P(PlanTable, RehearsesOnEveryMesh) {
  std::vector<Case> all;
  std::size_t turn = 0;
  for (const Mesh& mesh : meshes(GetParam())) {
    for (const PartitionKind& partition : partition_kinds()) {
      for (const Heads heads : head_counts()) {
        for (const std::string_view strategy : strategies_of_two_axes()) {
          if (++turn % kCoarser != 0) continue;
          const Shape shape = shape_of({27, 27}, heads);
          const auto words = masks(shape);
          all.push_back({shape, words[turn % words.size()], partition.name, strategy, mesh});
        }
      }
    }
  }
  check(all);
}

INSTANTIATE_TEST_SUITE_P(Ranks, PlanTable, testing::Range(1, 17));

// The interpreter shares no code with rehearse(): both must find the strategies right.
TEST(PlanTable, Executes) {
  for (const int ranks : {1, 2, 3, 5}) {
    for (const Case& c : cases(ranks, 37 * kCoarser)) {
      const Problem keeping = c.problem().keeping(true);
      const bool keeps = !make_program(c.how(), keeping, 0, Pass::forward).kept.empty();
      for (const Problem& problem : {c.problem(), keeping}) {
        if (problem.keeps() && !keeps) continue;
        for (const Pass pass : kPasses) {
          const Plan plan = make_plan(c.how(), problem, pass);
          for (const Weather weather : {Weather::Late, Weather::Random}) {
            EXPECT_EQ(interpret(problem, plan, weather, 5), "") << c.text() << name_of(pass);
          }
        }
      }
    }
  }
}

TEST(PlanTable, StrategiesRefuseInOneLineWithTheFix) {
  const Shape shape = shape_of({8, 8}, {2, 2, 2});
  const MaskPtr mask = parse_mask("full@0;window:0,0@1", shape);
  const Mesh two{{{"ring", 2}, {"heads", 2}}};
  for (const Strategy& s : strategies()) {
    const bool wants_two = s.axes.find(',') != std::string_view::npos;
    for (const Mesh& mesh : {line(4), two}) {
      const auto why = s.refuses(Problem(shape, mask, mesh, "zigzag"));
      const bool fits = s.name != "local" && wants_two == (mesh.axes.size() == 2);
      EXPECT_EQ(why.has_value(), !fits) << s.name << " " << mesh.text();
      if (why) {
        EXPECT_EQ(why->find('\n'), std::string::npos);
        if (wants_two) {
          EXPECT_NE(why->find("--mesh 2x"), std::string::npos) << *why;
        }
      }
    }
    if (s.name == "mixed") {
      const auto why = s.refuses(Problem(shape, parse_mask("full", shape), line(4), "zigzag"));
      EXPECT_NE(why.value_or("").find("give --head-masks"), std::string::npos);
    }
    EXPECT_EQ(find_strategy(s.name), &s);
    for (const int ranks : {1, 2, 12}) EXPECT_EQ(s.mesh(ranks, shape).ranks(), ranks);
  }
  EXPECT_EQ(find_strategy("none"), nullptr);
}

TEST(Mesh, NumbersTheLastAxisFastest) {
  const Mesh mesh{{{"a", 2}, {"b", 3}, {"c", 2}}};
  EXPECT_EQ(mesh.ranks(), 12);
  EXPECT_EQ(mesh.text(), "2x3x2");
  for (int r = 0; r < 12; ++r) {
    EXPECT_EQ(mesh.coordinate(r, 0) * 6 + mesh.coordinate(r, 1) * 2 + mesh.coordinate(r, 2), r);
    for (int axis = 0; axis < 3; ++axis) {
      const auto group = mesh.group(r, axis);
      ASSERT_EQ(group[static_cast<std::size_t>(mesh.coordinate(r, axis))], r);
      for (const int member : group) {
        for (int other = 0; other < 3; ++other) {
          if (other == axis) continue;
          EXPECT_EQ(mesh.coordinate(member, other), mesh.coordinate(r, other));
        }
      }
    }
  }
}

}  // namespace
}  // namespace dattn
