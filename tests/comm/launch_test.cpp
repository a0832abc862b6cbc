#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "comm/session.hpp"

namespace dattn::comm {
namespace {

using testing::HasSubstr;
using testing::Optional;

TEST(Launch, NothingToComplainAbout) {
  EXPECT_EQ(launch_complaint(1, nullptr, nullptr), std::nullopt);
  EXPECT_EQ(launch_complaint(4, "4", nullptr), std::nullopt);
  EXPECT_EQ(launch_complaint(4, nullptr, "4"), std::nullopt);
  EXPECT_EQ(launch_complaint(1, "", "four"), std::nullopt);
}

TEST(Launch, MpirunMayStartFewerRanksThanTheSlurmJobHasTasks) {
  EXPECT_EQ(launch_complaint(2, "2", "8"), std::nullopt);
}

TEST(Launch, NamesTheLauncherAndTheRemedy) {
  EXPECT_THAT(launch_complaint(1, nullptr, "8"), Optional(HasSubstr("srun started 8 ranks")));
  EXPECT_THAT(launch_complaint(1, nullptr, "8"), Optional(HasSubstr("--mpi=pmix")));
  EXPECT_THAT(launch_complaint(1, "3", nullptr), Optional(HasSubstr("mpirun started 3 ranks")));
}

}  // namespace
}  // namespace dattn::comm
