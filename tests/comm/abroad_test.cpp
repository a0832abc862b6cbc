// Messages to other hosts, whose pieces after the first wait until the receiver asks for them, on
// hosts that are pretended.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <cstdint>
#include <list>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <vector>

#include "comm/communicator.hpp"
#include "comm/error.hpp"
#include "comm/wait.hpp"
#include "tests/mpi_main.hpp"

namespace {

/// What this process has given MPI to send.
struct Given {
  int sends = 0;
  std::int64_t bytes = 0;
};
Given given;

int count(int number, MPI_Datatype type) {
  int size = 0;
  MPI_Type_size(type, &size);
  ++given.sends;
  given.bytes += static_cast<std::int64_t>(number) * size;
  return number;
}

}  // namespace

// They stand before MPI's own.
extern "C" {
int MPI_Isend(const void* data, int number, MPI_Datatype type, int peer, int tag, MPI_Comm comm,
              MPI_Request* request) {
  return PMPI_Isend(data, count(number, type), type, peer, tag, comm, request);
}
int MPI_Issend(const void* data, int number, MPI_Datatype type, int peer, int tag, MPI_Comm comm,
               MPI_Request* request) {
  return PMPI_Issend(data, count(number, type), type, peer, tag, comm, request);
}
}

namespace dattn::comm {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr std::int64_t kPiece = 7;
constexpr std::int64_t kFront = 8;  // the length in front of the first piece

/// Neighbouring ranks, so many a host; pieces of a few bytes.
void pretend(int ranks_a_host, bool synchronous = false) {
  Communicator::Options options = world().options();
  options.piece = options.piece_abroad = kPiece;
  options.synchronous = synchronous;
  world().set_options(options);
  std::vector<int> hosts;
  for (int r = 0; r < world().size(); ++r) hosts.push_back(r / ranks_a_host);
  world().pretend_hosts(hosts);
}

std::vector<std::byte> filled(std::int64_t bytes, int seed) {
  std::vector<std::byte> all;
  for (std::int64_t i = 0; i < bytes; ++i) {
    all.push_back(static_cast<std::byte>(seed * 37 + i * 11 + i / 253));
  }
  return all;
}

int next() { return (world().rank() + 1) % world().size(); }
int previous() { return (world().rank() + world().size() - 1) % world().size(); }

/// Every rank goes through the same list of messages and posts its ends of them; it waits for some
/// of them, in any order, by wait() or by nothing but polls.
void long_talk(int ranks_a_host, bool synchronous, unsigned seed) {
  pretend(ranks_a_host, synchronous);
  struct Pending {
    Request request;
    std::vector<std::byte> bytes;
    int seed;  // of what is expected; -1: it is a send
  };
  std::list<Pending> pending;
  std::mt19937 bits(seed);
  const auto pick = [&](int below) {
    return static_cast<int>(bits() % static_cast<unsigned>(below));
  };
  const auto finish = [&](std::list<Pending>::iterator one) {
    one->request.wait();
    if (one->seed >= 0) {
      EXPECT_EQ(one->bytes, filled(std::ssize(one->bytes), one->seed));
    }
    return pending.erase(one);
  };
  // A part of the ranks at a time talks by a communicator of its own: one outbox serves them all.
  Communicator half = world().split(world().rank() % 2, world().rank());
  for (int n = 0; n < 300; ++n) {
    const int from = pick(world().size());
    const int to = pick(world().size());
    const int tag = pick(3);
    const std::int64_t bytes = pick(3) == 0 ? pick(600) : pick(20);
    const bool splits = from % 2 == to % 2 && pick(2) == 0;
    Communicator& ranks = splits ? half : world();
    if (world().rank() == to) {
      Pending& one = pending.emplace_back(
          Request(), std::vector<std::byte>(static_cast<std::size_t>(bytes)), n);
      one.request = ranks.recv(strips_of(std::span(one.bytes)), splits ? from / 2 : from, tag);
    }
    if (world().rank() == from) {
      Pending& one = pending.emplace_back(Request(), filled(bytes, n), -1);
      one.request = ranks.send(strips_of(std::span(one.bytes)), splits ? to / 2 : to, tag);
    }
    const bool waits = pick(4) == 0;
    const int which = pick(1000);
    if (pick(40) == 0) world().barrier();
    if (!waits || pending.empty()) continue;
    auto one = pending.begin();
    std::advance(one, which % static_cast<int>(pending.size()));
    finish(one);
  }
  for (auto one = pending.begin(); one != pending.end();) one = finish(one);
}

TEST(Abroad, ALongTalkOfHostsOfOne) { long_talk(1, false, 1); }
TEST(Abroad, ALongTalkOfHostsOfTwo) { long_talk(2, false, 2); }
TEST(Abroad, ALongSynchronousTalk) { long_talk(1, true, 3); }

TEST(Abroad, NothingButTheFirstPieceGoesBeforeItIsAskedFor) {
  if (world().size() == 1) return;
  pretend(1);
  constexpr int kMessages = 5;
  constexpr std::int64_t kBytes = 1000;
  std::vector<std::vector<std::byte>> out, in;
  std::vector<Request> sends;
  given = {};
  for (int k = 0; k < kMessages; ++k) {
    out.push_back(filled(kBytes, world().rank() + 10 * k));
    in.emplace_back(static_cast<std::size_t>(kBytes));
    sends.push_back(world().send(strips_of(std::span(out.back())), next()));
  }
  const auto unasked = [&] {
    EXPECT_EQ(given.sends, kMessages);
    EXPECT_EQ(given.bytes, kMessages * (kPiece + kFront));
    for (Request& send : sends) EXPECT_FALSE(send.test());
  };
  unasked();
  world().barrier();
  for (int i = 0; i < 100; ++i) world().poll();
  unasked();
  world().barrier();
  // Each is asked for by itself, and then goes though nobody tests its send: polls do.
  for (int k = 0; k < kMessages; ++k) {
    auto& bytes = in[static_cast<std::size_t>(k)];
    Request got = world().recv(strips_of(std::span(bytes)), previous());
    const std::int64_t by_now = kMessages * (kPiece + kFront) + (k + 1) * (kBytes - kPiece);
    wait_until(
        20, [&] { return given.bytes >= by_now; }, [] { return "a send that is asked for"; },
        [] { world().poll(); });
    EXPECT_EQ(given.bytes, by_now);
    got.wait();
    EXPECT_EQ(bytes, filled(kBytes, previous() + 10 * k)) << k;
    world().barrier();  // nobody asks for the next before all have got this
  }
  for (Request& send : sends) send.wait();
  const std::int64_t pieces = (kBytes + kPiece - 1) / kPiece;
  EXPECT_EQ(given.sends, kMessages * (pieces + 1));  // and that it asked for as many itself
  EXPECT_EQ(given.bytes, kMessages * (kBytes + kFront));
}

TEST(Abroad, WithinAHostNobodyAsks) {
  if (world().size() == 1) return;
  pretend(world().size());
  std::vector<std::byte> out = filled(100, world().rank());
  std::vector<std::byte> in(out.size());
  given = {};
  Request sent = world().send(strips_of(std::span(out)), next());
  EXPECT_EQ(given.sends, (100 + kPiece - 1) / kPiece);
  world().recv(strips_of(std::span(in)), previous()).wait();
  sent.wait();
  EXPECT_EQ(in, filled(100, previous()));
  EXPECT_EQ(given.bytes, 100 + kFront);
}

TEST(Abroad, ASendThatNobodyAsksForEndsAtTheDeadline) {
  if (world().size() == 1) return;
  pretend(1);
  std::vector<std::byte> out = filled(100, world().rank());
  std::vector<std::byte> in(out.size());
  world().set_deadline(0.05);
  Request sent = world().send(strips_of(std::span(out)), next(), 3);
  try {
    sent.wait();
    FAIL();
  } catch (const Timeout& error) {
    EXPECT_THAT(error.what(),
                AllOf(HasSubstr("send of 100 bytes to rank " + std::to_string(next())),
                      HasSubstr("(tag 3)"), HasSubstr("not complete after 0.")));
  }
  world().set_deadline(20);
  world().barrier();  // nobody asks before everybody has waited in vain
  world().recv(strips_of(std::span(in)), previous(), 3).wait();
  while (!sent.test()) {
  }
  EXPECT_EQ(in, filled(100, previous()));
}

TEST(Abroad, OfASendThatIsDroppedWhileAnExceptionUnwindsNothingMoreGoes) {
  if (world().size() == 1) return;
  pretend(1);
  std::vector<std::byte> out = filled(100, world().rank());
  std::vector<std::byte> in(out.size());
  try {
    Request sent = world().send(strips_of(std::span(out)), next());
    throw std::runtime_error("unwind");
  } catch (const std::runtime_error&) {
  }
  world().barrier();  // nobody asks before all have dropped theirs
  try {
    world().set_deadline(0.05);
    Request got = world().recv(strips_of(std::span(in)), previous());
    world().set_deadline(20);
    given = {};
    world().barrier();  // all have asked
    got.wait();
    FAIL();
  } catch (const Timeout&) {
  }
  EXPECT_EQ(given.sends, 0);
}

TEST(Abroad, AnotherLengthIsAMismatch) {
  if (world().size() == 1) return;
  pretend(1);
  std::list<Communicator> channels;  // what is left over stays in them
  for (const auto& [sent, expected] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {14, 7}, {7, 14}, {15, 8}, {8, 15}, {0, 60}, {60, 0}, {15, 21}, {21, 15}, {22, 21}}) {
    Communicator& channel = channels.emplace_back(world().split(0, world().rank()));
    std::vector<std::byte> out(static_cast<std::size_t>(sent));
    std::vector<std::byte> in(static_cast<std::size_t>(expected));
    std::optional<Mismatch> seen;
    try {
      Request got = channel.recv(strips_of(std::span(in)), previous());
      Request send = channel.send(strips_of(std::span(out)), next());
      got.wait();  // throws, and nobody waits for the send
    } catch (const Mismatch& error) {
      seen = error;
    }
    ASSERT_TRUE(seen) << sent << " bytes were taken for " << expected;
    EXPECT_EQ(seen->expected, expected);
    EXPECT_EQ(seen->got, expected <= kPiece && sent > kPiece ? kPiece : sent);
    world().barrier();
  }
}

}  // namespace
}  // namespace dattn::comm
