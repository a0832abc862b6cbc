// The engine over MPI, at every rank count that ctest starts it with.
#include <gtest/gtest.h>

#include <span>

#include "parallel/signature.hpp"
#include "tests/mpi_main.hpp"
#include "tests/parallel/engine_cases.hpp"

namespace dattn::testing {
namespace {

double over_all_ranks(double x) {
  comm::world().all_reduce_sum(std::span(&x, 1));
  return x;
}

std::string trouble_with(const Case& c, bool checked) {
  return testing::trouble_with(c, comm::world(), checked, over_all_ranks);
}

TEST(EngineOverMpi, AgreesWithTheReference) {
  bool checked = false;  // with and without NaN in what waits for a message
  for (const Case& c : cases(comm::world().size(), 23)) {
    EXPECT_EQ(trouble_with(c, checked), "");
    checked = !checked;
  }
}

TEST(EngineOverMpi, SumsMayTravelInBfloat16) {
  for (const Case& c : wire_cases(comm::world().size())) EXPECT_EQ(trouble_with(c, true), "");
}

TEST(EngineOverMpi, CompensatesForDroppedKeys) {
  for (const Case& c : compensated_cases(comm::world().size()))
    EXPECT_EQ(trouble_with(c, true), "");
}

TEST(EngineOverMpi, EveryMeshOfTwoAxes) {
  for (const Mesh& mesh : meshes(comm::world().size())) {
    for (const std::string_view strategy : strategies_of_two_axes()) {
      const Case c{{83, 83, 6, 2, 3, 8, 5}, "causal", "zigzag", strategy, mesh};
      EXPECT_EQ(trouble_with(c, true), "");
    }
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
