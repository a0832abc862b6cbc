// The engine over MPI, at every rank count that ctest starts it with.
#include <gtest/gtest.h>

#include <array>

#include "parallel/signature.hpp"
#include "tests/mpi_main.hpp"
#include "tests/parallel/engine_cases.hpp"

namespace dattn::testing {
namespace {

template <class T>
void agree_with_the_reference(Type type, double bound, double lse_bound, bool checked) {
  comm::Communicator& all = comm::world();
  for (const EngineCase& c : engine_cases(all.size())) {
    const Tensors<T> tensors(c.shape, 21);
    const MaskPtr mask = parse_mask(c.mask, c.shape);
    for (const Strategy& strategy : strategies()) {
      for (const PartitionKind& partition : partition_kinds()) {
        const Problem problem(c.shape, mask, strategy.mesh(all.size(), c.shape), partition.name,
                              type);
        if (strategy.refuses(problem)) continue;
        const Outcome mine = run_and_judge(problem, strategy, all, tensors, {.checked = checked});
        std::array<double, 2> sums{mine.error, mine.reference};
        all.all_reduce_sum(sums);
        const std::string name = name_of_case(problem, strategy);
        EXPECT_LE(std::sqrt(sums[0]), bound * std::sqrt(sums[1])) << name;
        EXPECT_LE(mine.lse_error, lse_bound) << name;
        EXPECT_TRUE(mine.rows_without_keys_are_empty) << name;
        const Rehearsal rehearsal = rehearse(problem, make_plan(strategy, problem));
        EXPECT_EQ(mine.times.bytes_sent, rehearsal.bytes_sent[static_cast<std::size_t>(all.rank())])
            << name;
      }
    }
  }
}

TEST(EngineOverMpi, AgreesWithTheReference) {
  agree_with_the_reference<float>(Type::f4, 1e-6, 1e-6, true);
}

TEST(EngineOverMpi, AgreesWithTheReferenceInDouble) {
  agree_with_the_reference<double>(Type::f8, 1e-14, 1e-13, false);
}

TEST(EngineOverMpi, EveryMeshOfTwoAxes) {
  comm::Communicator& all = comm::world();
  const Shape shape{83, 83, 6, 2, 3, 8, 5};
  const Tensors<float> tensors(shape, 4);
  const Strategy& usp = *find_strategy("usp");
  for (int inner = 1; inner <= all.size(); ++inner) {
    if (all.size() % inner != 0) continue;
    const Mesh mesh{{{"ring", all.size() / inner}, {"heads", inner}}};
    const Problem problem(shape, parse_mask("causal", shape), mesh, "zigzag");
    const Outcome mine = run_and_judge(problem, usp, all, tensors, {.checked = true});
    std::array<double, 2> sums{mine.error, mine.reference};
    all.all_reduce_sum(sums);
    EXPECT_LE(std::sqrt(sums[0]), 1e-6 * std::sqrt(sums[1])) << mesh.text();
    EXPECT_LE(mine.lse_error, 1e-6) << mesh.text();
  }
}

TEST(Signature, EqualOnesAgree) {
  EXPECT_NO_THROW(require_agreement(comm::world(), {{"--mask", "causal"}, {"tokens", "7"}}));
}

TEST(Signature, NamesRankAndField) {
  comm::Communicator& all = comm::world();
  const int odd = all.size() - 1;
  if (odd == 0) return;  // one rank cannot disagree
  const std::string mine = all.rank() == odd ? "full" : "causal";
  try {
    require_agreement(all, {{"tokens", "7"}, {"--mask", mine}});
    FAIL();
  } catch (const Disagreement& e) {
    EXPECT_NE(std::string(e.what()).find("rank " + std::to_string(odd) + " has --mask 'full'"),
              std::string::npos)
        << e.what();
  }
}

}  // namespace
}  // namespace dattn::testing
