// For programs that initialise MPI themselves: our messages never meet theirs.

#include <gtest/gtest.h>

#include "comm/error.hpp"
#include "comm/mpi.hpp"
#include "comm/session.hpp"
#include "tests/mpi_main.hpp"

namespace dattn::comm {
namespace {

TEST(Adopt, MessagesOfTheTwoCommunicatorsStayApart) {
  Communicator ours = adopt(MPI_COMM_WORLD);
  const int peer = 1 - ours.rank();
  std::byte mine{1};
  std::byte theirs{2};
  std::byte got{0};
  std::byte user{0};
  MPI_Request sent = MPI_REQUEST_NULL;
  check(MPI_Isend(&theirs, 1, MPI_BYTE, peer, 0, MPI_COMM_WORLD, &sent));
  Request send = ours.send(strips_of(std::span(&mine, 1)), peer);
  ours.recv(strips_of(std::span(&got, 1)), peer).wait();
  check(MPI_Recv(&user, 1, MPI_BYTE, peer, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE));
  check(MPI_Wait(&sent, MPI_STATUS_IGNORE));
  send.wait();
  EXPECT_EQ(got, mine);
  EXPECT_EQ(user, theirs);
}

TEST(Adopt, ASecondSessionIsRefused) { EXPECT_THROW(Session(), std::logic_error); }

TEST(Adopt, FailuresOfMpiAreErrorsWithItsMessage) {
  try {
    check(MPI_Send(nullptr, 1, MPI_BYTE, 99, 0, MPI_COMM_WORLD));
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(&error.code().category(), &mpi_category());
    EXPECT_NE(std::string(error.what()).find("adopt_test.cpp"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("MPI_ERR_"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace dattn::comm
