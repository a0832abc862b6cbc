#include "comm/loopback.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "comm/error.hpp"
#include "comm/transport.hpp"
#include "tests/comm/affine.hpp"
#include "tests/loopback_ranks.hpp"

namespace dattn::comm {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::span<std::byte> bytes_of(int& value) { return std::as_writable_bytes(std::span(&value, 1)); }

class LoopbackTest : public testing::TestWithParam<std::tuple<int, int, bool>> {
 protected:
  int ranks = std::get<0>(GetParam());
  Loopback job{ranks,
               {.seed = 7,
                .max_delay_polls = std::get<1>(GetParam()),
                .rendezvous = std::get<2>(GetParam())}};
  std::vector<std::string> quiet = std::vector<std::string>(static_cast<std::size_t>(ranks));
};

TEST_P(LoopbackTest, MessagesOfAChannelKeepTheirOrder) {
  constexpr int kMessages = 20;
  const auto errors = errors_on_ranks(job, ranks, [](Loopback::Endpoint& me) {
    const int to = (me.rank() + 1) % me.size();
    const int from = (me.rank() + me.size() - 1) % me.size();
    std::vector<int> out(kMessages);
    std::vector<int> in(kMessages, -1);
    {
      std::vector<Loopback::Request> requests;
      for (std::size_t k = 0; k < kMessages; ++k) {
        out[k] = me.rank() * 1000 + static_cast<int>(k);
        requests.push_back(me.send(strips_of(bytes_of(out[k])), to));
        requests.push_back(me.recv(strips_of(bytes_of(in[k])), from));
      }
      for (auto request = requests.rbegin(); request != requests.rend(); ++request) {
        request->wait();
      }
    }
    for (std::size_t k = 0; k < kMessages; ++k) {
      if (in[k] != from * 1000 + static_cast<int>(k)) throw std::runtime_error("wrong order");
    }
  });
  EXPECT_EQ(errors, quiet);
}

TEST_P(LoopbackTest, StripsNeedNotAgree) {
  const auto errors = errors_on_ranks(job, ranks, [](Loopback::Endpoint& me) {
    std::string out = "a.b.c.d.e.f.";
    std::string in = "------------";
    auto* source = reinterpret_cast<std::byte*>(out.data());
    auto* target = reinterpret_cast<std::byte*>(in.data());
    auto sent = me.send(Strips{{source, 6, 1, 2}}, (me.rank() + 1) % me.size());
    auto got = me.recv(Strips{{target, 2, 3, 5}}, (me.rank() + me.size() - 1) % me.size());
    got.wait();
    sent.wait();
    if (in != "abc--def----") throw std::runtime_error(in);
  });
  EXPECT_EQ(errors, quiet);
}

TEST_P(LoopbackTest, AllReduceCombinesInRankOrder) {
  const auto errors = errors_on_ranks(job, ranks, [](Loopback::Endpoint& me) {
    for (int round = 0; round < 5; ++round) {
      std::vector<Affine> mine = affine_records(me.rank(), 11);
      me.all_reduce(std::as_writable_bytes(std::span(mine)), sizeof(Affine),
                    operation<compose>(false));
      if (mine != composed(me.size(), 11)) throw std::runtime_error("wrong composition");
      me.barrier();
    }
  });
  EXPECT_EQ(errors, quiet);
}

TEST_P(LoopbackTest, SplitOrdersByKeyAndKeepsPartsApart) {
  const auto errors = errors_on_ranks(job, ranks, [](Loopback::Endpoint& me) {
    Loopback::Endpoint part = me.split(me.rank() % 2, -me.rank());
    const int members = (me.size() + 1 - me.rank() % 2) / 2;
    if (part.size() != members) throw std::runtime_error("wrong size");
    if (part.rank() != members - 1 - me.rank() / 2) throw std::runtime_error("wrong rank");
    int mine = me.rank();
    int other = -1;
    auto got = part.recv(strips_of(bytes_of(other)), (part.rank() + 1) % members);
    auto sent = part.send(strips_of(bytes_of(mine)), (part.rank() + members - 1) % members);
    got.wait();
    sent.wait();
    if (other % 2 != mine % 2) throw std::runtime_error("message from another part");
  });
  EXPECT_EQ(errors, quiet);
}

TEST_P(LoopbackTest, OneFailureEndsEveryWait) {
  if (ranks == 1) GTEST_SKIP();
  const auto errors = errors_on_ranks(job, ranks, [](Loopback::Endpoint& me) {
    if (me.rank() == 0) throw std::runtime_error("rank 0 gives up");
    int value = 0;
    if (me.rank() % 2 == 0) me.barrier();
    auto got = me.recv(strips_of(bytes_of(value)), 0);
    got.wait();
  });
  for (const std::string& error : errors) EXPECT_THAT(error, HasSubstr("rank 0 gives up"));
}

INSTANTIATE_TEST_SUITE_P(All, LoopbackTest,
                         testing::Combine(testing::Values(1, 2, 3, 5, 8), testing::Values(0, 13),
                                          testing::Bool()));

TEST(Loopback, ADelayedMessageArrivesAfterItsPollsAndNoEarlier) {
  int longest = 0;
  Loopback job(1, {.seed = 3, .max_delay_polls = 9});
  for (int k = 0; k < 50; ++k) {
    int out = k;
    int in = -1;
    auto sent = job.at(0).send(strips_of(bytes_of(out)), 0);
    auto got = job.at(0).recv(strips_of(bytes_of(in)), 0);
    EXPECT_TRUE(sent.test());
    int polls = 0;
    while (!got.test()) {
      EXPECT_EQ(in, -1);
      ++polls;
    }
    EXPECT_EQ(in, k);
    EXPECT_LE(polls, 9);
    longest = std::max(longest, polls);
  }
  EXPECT_GT(longest, 4);
}

TEST(Loopback, ARendezvousSendWaitsForItsReceive) {
  Loopback job(2, {.rendezvous = true});
  int out = 5;
  int in = -1;
  auto sent = job.at(0).send(strips_of(bytes_of(out)), 1);
  EXPECT_FALSE(sent.test());
  auto got = job.at(1).recv(strips_of(bytes_of(in)), 0);
  out = 6;  // read when the receive is there, not before
  EXPECT_TRUE(sent.test());
  EXPECT_EQ(in, 6);
  EXPECT_TRUE(got.test());
}

TEST(Loopback, AnEagerSendIsDoneAtOnce) {
  Loopback job(2);
  int out = 5;
  int in = -1;
  EXPECT_TRUE(job.at(0).send(strips_of(bytes_of(out)), 1).test());
  out = 6;
  job.at(1).recv(strips_of(bytes_of(in)), 0).wait();
  EXPECT_EQ(in, 5);
}

TEST(Loopback, AnotherLengthIsAMismatch) {
  for (const bool rendezvous : {false, true}) {
    Loopback job(2, {.rendezvous = rendezvous});
    std::vector<std::byte> out(5);
    std::vector<std::byte> in(8);
    auto sent = job.at(0).send(strips_of(std::span(out)), 1);
    auto got = job.at(1).recv(strips_of(std::span(in)), 0);
    try {
      got.wait();
      FAIL();
    } catch (const Mismatch& error) {
      EXPECT_EQ(error.expected, 8);
      EXPECT_EQ(error.got, 5);
      EXPECT_THAT(error.what(), HasSubstr("from rank 0 to rank 1: expected 8 bytes, got 5"));
    }
    sent.wait();
  }
}

TEST(Loopback, AWaitEndsAtTheDeadlineAndNamesTheMessage) {
  Loopback job(2, {.deadline = 0.02});
  int value = 0;
  auto got = job.at(1).recv(strips_of(bytes_of(value)), 0);
  try {
    got.wait();
    FAIL();
  } catch (const Timeout& error) {
    EXPECT_GE(error.seconds, 0.02);
    EXPECT_THAT(error.what(), AllOf(HasSubstr("receive of 4 bytes from rank 0"), HasSubstr(" s")));
  }
  int out = 3;
  job.at(0).send(strips_of(bytes_of(out)), 1).wait();
  got.wait();
  EXPECT_EQ(value, 3);
}

TEST(Loopback, ADroppedReceiveIsNeverWrittenTo) {
  Loopback job(2, {.deadline = 0.02});
  int out = 3;
  int in = -1;
  { auto dropped = job.at(1).recv(strips_of(bytes_of(in)), 0); }
  EXPECT_THROW(static_cast<void>(job.at(0).send(strips_of(bytes_of(out)), 1)), std::runtime_error);
  EXPECT_EQ(in, -1);
}

TEST(Loopback, RanksThatDisagreeAboutACollectiveAreTold) {
  Loopback job(2);
  const auto errors = errors_on_ranks(job, 2, [](Loopback::Endpoint& me) {
    std::vector<Affine> mine = affine_records(me.rank(), 2 + static_cast<std::size_t>(me.rank()));
    me.all_reduce(std::as_writable_bytes(std::span(mine)), sizeof(Affine), operation<compose>());
  });
  for (const std::string& error : errors) EXPECT_THAT(error, HasSubstr("disagree"));
}

TEST(Loopback, BrokenPreconditionsThrow) {
  EXPECT_THROW(Loopback(0), std::invalid_argument);
  Loopback job(2);
  int value = 0;
  EXPECT_THROW(static_cast<void>(job.at(0).recv(strips_of(bytes_of(value)), 2)),
               std::invalid_argument);
  EXPECT_THROW(static_cast<void>(job.at(0).send(strips_of(bytes_of(value)), -1)),
               std::invalid_argument);
}

}  // namespace
}  // namespace dattn::comm
