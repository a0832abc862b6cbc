// Not a test that passes: CTest expects its report (tests/comm/CMakeLists.txt).

#include <gtest/gtest.h>

#include "tests/mpi_main.hpp"

namespace dattn::comm {
namespace {

TEST(Harness, PassesEverywhere) { EXPECT_EQ(world().size(), 3); }

TEST(Harness, FailsOnRank2) { ASSERT_NE(world().rank(), 2) << "a line\nexpected failure"; }

TEST(Harness, ComesAfterTheFailure) { world().barrier(); }

}  // namespace
}  // namespace dattn::comm
