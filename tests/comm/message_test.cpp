#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "comm/error.hpp"
#include "comm/transport.hpp"
#include "tests/mpi_main.hpp"

namespace dattn::comm {
namespace {

using testing::AllOf;
using testing::HasSubstr;

/// The i-th byte that `rank` sends.
std::byte byte_of(int rank, std::int64_t i) {
  return static_cast<std::byte>((rank + 1) * 31 + i * 7 + i / 251);
}

std::vector<std::byte> stream(int rank, std::int64_t bytes) {
  std::vector<std::byte> out;
  for (std::int64_t i = 0; i < bytes; ++i) out.push_back(byte_of(rank, i));
  return out;
}

int next() { return (world().rank() + 1) % world().size(); }
int previous() { return (world().rank() + world().size() - 1) % world().size(); }

/// Memory with gaps, and strips over it that take up `bytes` bytes.
struct Strided {
  std::vector<std::byte> memory;
  Strips strips;

  Strided(std::int64_t pieces, std::int64_t length, std::int64_t stride, std::int64_t tail)
      : memory(static_cast<std::size_t>(pieces * stride + 3 + tail), std::byte{0xee}) {
    strips = {{memory.data(), pieces, length, stride},
              {memory.data() + pieces * stride + 3, 1, tail, tail}};
  }
  Strided(const Strided&) = delete;
  Strided& operator=(const Strided&) = delete;

  std::vector<std::byte> bytes() const {
    std::vector<std::byte> out(static_cast<std::size_t>(total(strips)));
    pack(read_only(strips), out);
    return out;
  }
  /// Whether all bytes that are not under the strips are as at first.
  bool gaps_untouched() const {
    std::vector<std::byte> copy = memory;
    for (const Strip& strip : strips) {
      for (std::int64_t i = 0; i < strip.count * strip.length; ++i) {
        const std::int64_t at = i / strip.length * strip.stride + i % strip.length;
        copy[static_cast<std::size_t>(strip.data - memory.data() + at)] = std::byte{0xee};
      }
    }
    return copy == std::vector<std::byte>(copy.size(), std::byte{0xee});
  }
};

struct Way {
  std::int64_t limit;  // the pieces of a message and what MPI is given are as long
  bool synchronous;
  bool abroad = false;  // each rank counts as a host
};

class MessageTest : public testing::TestWithParam<Way> {
 protected:
  void SetUp() override {
    world().set_options({.piece = GetParam().limit,
                         .piece_abroad = GetParam().limit,
                         .message_limit = GetParam().limit,
                         .synchronous = GetParam().synchronous,
                         .deadline = world().options().deadline});
    if (!GetParam().abroad) return;
    std::vector<int> hosts(static_cast<std::size_t>(world().size()));
    std::iota(hosts.begin(), hosts.end(), 0);
    world().pretend_hosts(hosts);
  }
};

TEST_P(MessageTest, StridedToStridedRoundTheRing) {
  // 12 x 5 + 9 = 23 x 3 + 0 bytes, cut quite differently.
  Strided out(12, 5, 8, 9);
  Strided in(23, 3, 4, 0);
  ASSERT_EQ(total(out.strips), total(in.strips));
  unpack(stream(world().rank(), total(out.strips)), out.strips);
  Request got = world().recv(in.strips, previous());
  Request sent = world().send(out.strips, next());
  got.wait();
  sent.wait();
  EXPECT_EQ(in.bytes(), stream(previous(), total(in.strips)));
  EXPECT_TRUE(in.gaps_untouched());
}

TEST_P(MessageTest, EveryLengthUpToAFewPieces) {
  for (std::int64_t bytes = 0; bytes <= 30; ++bytes) {
    std::vector<std::byte> out = stream(world().rank(), bytes);
    std::vector<std::byte> in(out.size());
    Request got = world().recv(strips_of(std::span(in)), previous());
    Request sent = world().send(strips_of(std::span<const std::byte>(out)), next());
    got.wait();
    sent.wait();
    ASSERT_EQ(in, stream(previous(), bytes));
  }
}

TEST_P(MessageTest, MessagesOfAChannelKeepTheirOrder) {
  // Lengths on both sides of the limit, long enough to leave the eager path now and then.
  const std::vector<std::int64_t> lengths{0, 3, 7, 8, 100, 1, 60, 14, 15, 0, 21};
  std::vector<std::vector<std::byte>> out;
  std::vector<std::vector<std::byte>> in;
  for (const std::int64_t bytes : lengths) {
    out.push_back(stream(world().rank() + static_cast<int>(out.size()), bytes));
    in.emplace_back(static_cast<std::size_t>(bytes));
  }
  std::vector<Request> requests;
  for (auto& message : out) requests.push_back(world().send(strips_of(std::span(message)), next()));
  for (auto& message : in) {
    requests.push_back(world().recv(strips_of(std::span(message)), previous()));
  }
  while (!requests.empty()) {  // completed from the back, by test() alone
    world().poll();
    if (requests.back().test()) requests.pop_back();
  }
  for (std::size_t k = 0; k < in.size(); ++k) {
    EXPECT_EQ(in[k], stream(previous() + static_cast<int>(k), lengths[k])) << k;
  }
}

TEST_P(MessageTest, TagsAreSeparateChannels) {
  std::byte first{1};
  std::byte second{2};
  std::byte got{0};
  Request a = world().send(strips_of(std::span(&first, 1)), next(), 5);
  Request b = world().send(strips_of(std::span(&second, 1)), next(), 6);
  world().recv(strips_of(std::span(&got, 1)), previous(), 6).wait();
  EXPECT_EQ(got, second);
  world().recv(strips_of(std::span(&got, 1)), previous(), 5).wait();
  EXPECT_EQ(got, first);
  a.wait();
  b.wait();
}

TEST_P(MessageTest, ToOneself) {
  Strided out(4, 3, 5, 2);
  std::vector<std::byte> in(14);
  unpack(stream(world().rank(), 14), out.strips);
  Request got = world().recv(strips_of(std::span(in)), world().rank());
  world().send(out.strips, world().rank()).wait();
  got.wait();
  EXPECT_EQ(in, stream(world().rank(), 14));
}

TEST_P(MessageTest, TheRequestOwnsTheBytesOfSendBytes) {
  std::vector<std::byte> in(40);
  Request sent = world().send_bytes(stream(world().rank(), 40), next());
  world().recv(strips_of(std::span(in)), previous()).wait();
  sent.wait();
  EXPECT_EQ(in, stream(previous(), 40));
}

TEST_P(MessageTest, AnotherLengthIsAMismatch) {
  // To itself, so that both ends are at hand whatever is left over.
  const int me = world().rank();
  for (const auto& [sent, expected] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {5, 6}, {6, 5}, {0, 1}, {1, 0}, {14, 7}, {7, 14}, {21, 14}, {14, 21}, {60, 3}}) {
    Communicator channel = world().split(0, me);
    channel.set_deadline(1);
    std::vector<std::byte> out(static_cast<std::size_t>(sent));
    std::vector<std::byte> in(static_cast<std::size_t>(expected));
    Request got = channel.recv(strips_of(std::span(in)), me);
    Request send = channel.send(strips_of(std::span(out)), me);
    try {
      got.wait();
      ADD_FAILURE() << sent << " bytes were taken for " << expected;
    } catch (const Mismatch& error) {
      EXPECT_EQ(error.expected, expected) << error.what();
      const bool bounded = expected <= GetParam().limit && sent > GetParam().limit;
      EXPECT_EQ(error.got, bounded ? GetParam().limit : sent) << error.what();
      EXPECT_THAT(error.what(), HasSubstr("from rank " + std::to_string(me)));
    }
    EXPECT_TRUE(got.test());  // done, if badly
    // Take what the mismatch left over, so that the send can complete.
    const std::int64_t limit = GetParam().limit;
    const std::int64_t pieces_sent = std::max<std::int64_t>(1, (sent + limit - 1) / limit);
    const std::int64_t pieces_taken = std::max<std::int64_t>(1, (expected + limit - 1) / limit);
    channel.set_options({.message_limit = 1 << 20, .synchronous = false, .deadline = 5});
    for (std::int64_t k = pieces_taken; k < pieces_sent; ++k) {
      std::vector<std::byte> rest(static_cast<std::size_t>(std::min(limit, sent - k * limit)));
      channel.recv(strips_of(std::span(rest)), me).wait();
    }
    send.wait();
  }
}

INSTANTIATE_TEST_SUITE_P(All, MessageTest,
                         testing::Values(Way{1 << 30, false}, Way{7, false}, Way{7, true},
                                         Way{1 << 30, true}, Way{7, false, true},
                                         Way{7, true, true}));

TEST(Message, AMegabyteStridedBothWays) {
  // 1000 x 1000 + 24000 = 512 x 2000 bytes: far beyond the eager path.
  Strided out(1000, 1000, 1024, 24000);
  Strided in(512, 2000, 2048, 0);
  ASSERT_EQ(total(out.strips), total(in.strips));
  unpack(stream(world().rank(), total(out.strips)), out.strips);
  Request got = world().recv(in.strips, previous());
  Request sent = world().send(out.strips, next());
  got.wait();
  sent.wait();
  EXPECT_EQ(in.bytes(), stream(previous(), total(in.strips)));
  EXPECT_TRUE(in.gaps_untouched());
}

TEST(Message, ASynchronousSendWaitsForItsReceive) {
  world().set_options({.synchronous = true, .deadline = 20});
  std::byte out{4};
  std::byte in{0};
  Request sent = world().send(strips_of(std::span(&out, 1)), next());
  for (int i = 0; i < 100; ++i) ASSERT_FALSE(sent.test());
  world().barrier();
  Request got = world().recv(strips_of(std::span(&in, 1)), previous());
  got.wait();
  sent.wait();
  EXPECT_EQ(in, out);
}

TEST(Message, AWaitEndsAtTheDeadlineAndNamesTheMessage) {
  Communicator channel = world().split(0, world().rank());
  channel.set_deadline(0.05);
  std::vector<std::byte> in(24);
  Request got = channel.recv(strips_of(std::span(in)), previous(), 3);
  try {
    got.wait();
    FAIL();
  } catch (const Timeout& error) {
    EXPECT_GE(error.seconds, 0.05);
    EXPECT_THAT(error.what(),
                AllOf(HasSubstr("receive of 24 bytes from rank " + std::to_string(previous())),
                      HasSubstr("(tag 3)"), HasSubstr("not complete after 0.")));
  }
  channel.set_deadline(20);
  world().barrier();  // nobody sends before everybody has waited in vain
  Request sent = channel.send_bytes(stream(world().rank(), 24), next(), 3);
  while (!got.test()) {
  }
  EXPECT_EQ(in, stream(previous(), 24));
  sent.wait();
}

TEST(Message, ADestructorWaits) {
  std::vector<std::byte> in(100);
  {
    Request got = world().recv(strips_of(std::span(in)), previous());
    Request sent = world().send_bytes(stream(world().rank(), 100), next());
  }
  EXPECT_EQ(in, stream(previous(), 100));
}

TEST(Message, ARequestThatIsOverwrittenWaitsToo) {
  std::vector<std::byte> in(100);
  Request sent = world().send_bytes(stream(world().rank(), 100), next());
  Request got = world().recv(strips_of(std::span(in)), previous());
  got = Request();
  EXPECT_EQ(in, stream(previous(), 100));
}

TEST(Message, ADestructorDoesNotWaitWhileAnExceptionUnwinds) {
  std::vector<std::byte> in(8, std::byte{9});
  try {
    Request got = world().recv(strips_of(std::span(in)), previous(), 1);
    throw std::runtime_error("unwind");
  } catch (const std::runtime_error&) {
  }
  world().barrier();
  // The receive was cancelled: what comes now does not go into its bytes.
  std::vector<std::byte> other(8);
  Request sent = world().send_bytes(stream(world().rank(), 8), next(), 1);
  world().recv(strips_of(std::span(other)), previous(), 1).wait();
  sent.wait();
  EXPECT_EQ(other, stream(previous(), 8));
  EXPECT_EQ(in, std::vector<std::byte>(8, std::byte{9}));
}

TEST(Message, KeepHoldsABufferUntilTheMessageIsComplete) {
  auto buffer = std::make_shared<std::vector<std::byte>>(8);
  const std::weak_ptr<std::vector<std::byte>> seen = buffer;
  Request got = world().recv(strips_of(std::span(*buffer)), previous());
  got.keep(std::exchange(buffer, nullptr));
  EXPECT_FALSE(seen.expired());
  Request sent = world().send_bytes(stream(world().rank(), 8), next());
  got.wait();
  EXPECT_TRUE(seen.expired());
  EXPECT_EQ(got.describe(), "nothing");
  sent.wait();
}

TEST(Message, BrokenPreconditionsThrow) {
  std::byte byte{};
  const Strips one = strips_of(std::span(&byte, 1));
  EXPECT_THROW(static_cast<void>(world().send(one, world().size())), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(world().recv(one, -1)), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(world().recv(one, 0, -1)), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(world().recv({{&byte, 2, 4, 1}}, 0)), std::invalid_argument);
  EXPECT_THROW(world().set_options({.piece = 0}), std::invalid_argument);
  EXPECT_THROW(world().set_options({.piece_abroad = 0}), std::invalid_argument);
  EXPECT_THROW(world().set_options({.message_limit = 0}), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(world().send(one, 0, 8192)), std::invalid_argument);
  EXPECT_THROW(world().pretend_hosts({}), std::invalid_argument);
}

}  // namespace
}  // namespace dattn::comm
