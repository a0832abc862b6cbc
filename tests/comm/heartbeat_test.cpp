#include "comm/heartbeat.hpp"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace dattn::comm {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

/// As the datagrams are on the wire.
struct Datagram {
  std::uint64_t job;
  std::int64_t moves;
  std::int32_t rank;
  std::int32_t alarm;
};

/// Waits until something has come, then takes it in.
void hear(Heartbeat& heart) {
  pollfd waiting{.fd = heart.socket(), .events = POLLIN, .revents = 0};
  ASSERT_EQ(::poll(&waiting, 1, 5000), 1) << "nothing comes on this machine's own network";
  heart.hear();
}

/// Where a rank 0 listens.
struct Address {
  explicit Address(const Heartbeat& zero) { std::istringstream(zero.address()) >> job >> port; }
  /// One of this machine's addresses is enough, so that each datagram comes once.
  std::string text() const {
    return std::to_string(job) + " " + std::to_string(port) + " 127.0.0.1";
  }

  std::uint64_t job = 0;
  std::uint16_t port = 0;
};

/// The heartbeats of one job.
struct Job {
  explicit Job(int size) {
    for (int r = 0; r < size; ++r) ranks.push_back(std::make_unique<Heartbeat>(r, size));
    address.emplace(*ranks[0]);
    for (auto& rank : ranks) rank->call(address->text());
  }
  Heartbeat& operator[](std::size_t r) { return *ranks[r]; }

  std::vector<std::unique_ptr<Heartbeat>> ranks;
  std::optional<Address> address;
};

/// Somebody who sends to a rank 0.
struct Sender {
  explicit Sender(const Address& address) {
    to.sin_family = AF_INET;
    to.sin_port = htons(address.port);
    ::inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
  }
  ~Sender() { ::close(socket); }
  void send(const Datagram& datagram, std::size_t bytes = sizeof(Datagram)) const {
    ASSERT_EQ(
        ::sendto(socket, &datagram, bytes, 0, reinterpret_cast<const sockaddr*>(&to), sizeof to),
        static_cast<ssize_t>(bytes));
  }

  sockaddr_in to{};
  int socket = ::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
};

TEST(HeartbeatTest, RankZeroAddsUpAndTellsAll) {
  Job job(3);
  job[1].tell(5, Alarm::none);
  hear(job[0]);
  job[2].tell(7, Alarm::none);
  hear(job[0]);
  EXPECT_EQ(job[0].moves_of_others(), 12);
  job[0].tell(100, Alarm::none);
  hear(job[1]);
  hear(job[2]);
  EXPECT_EQ(job[1].moves_of_others(), 112);
  EXPECT_EQ(job[2].moves_of_others(), 112);
}

TEST(HeartbeatTest, AnAlarmGoesThroughRankZeroAndStays) {
  Job job(3);
  job[2].tell(1, Alarm::none);
  hear(job[0]);
  job[1].tell(1, Alarm::stuck);
  hear(job[0]);
  EXPECT_EQ(job[0].alarm(), Alarm::stuck);
  job[2].tell(2, Alarm::failed);
  hear(job[0]);
  EXPECT_EQ(job[0].alarm(), Alarm::stuck) << "the greater one counts";
  job[0].tell(1, Alarm::none);
  hear(job[2]);
  EXPECT_EQ(job[2].alarm(), Alarm::stuck);
}

TEST(HeartbeatTest, ALostDatagramIsMadeUpForByTheNext) {
  Job job(2);
  job[1].tell(5, Alarm::failed);
  pollfd waiting{.fd = job[0].socket(), .events = POLLIN, .revents = 0};
  ASSERT_EQ(::poll(&waiting, 1, 5000), 1);
  Datagram lost{};
  while (::recv(job[0].socket(), &lost, sizeof lost, 0) > 0) continue;
  EXPECT_EQ(lost.moves, 5);
  job[0].hear();
  EXPECT_EQ(job[0].moves_of_others(), 0);
  job[1].tell(6, Alarm::none);
  hear(job[0]);
  EXPECT_EQ(job[0].moves_of_others(), 6);
  EXPECT_EQ(job[0].alarm(), Alarm::failed);
}

TEST(HeartbeatTest, SilentIsWhoWasHeardBefore) {
  Job job(3);
  EXPECT_THAT(job[0].silent(1000, 1), IsEmpty())
      << "of a rank that was never heard nothing is known";
  job[2].tell(1, Alarm::none);
  hear(job[0]);
  EXPECT_THAT(job[0].silent(1, 1), IsEmpty());
  EXPECT_THAT(job[0].silent(0.5, 1), ElementsAre(2));
  job[2].tell(1, Alarm::none);
  hear(job[0]);
  EXPECT_THAT(job[0].silent(1, 1), IsEmpty());
  job[0].tell(1, Alarm::none);
  hear(job[2]);
  EXPECT_THAT(job[2].silent(2, 1), ElementsAre(0)) << "the others watch over rank 0";
}

TEST(HeartbeatTest, ForeignDatagramsAreNotHeard) {
  Job job(2);
  const std::uint64_t number = job.address->job;
  const Sender sender(*job.address);
  sender.send({number + 1, 50, 1, 2});  // another job
  sender.send({0, 50, 1, 2});
  sender.send({number, 50, 0, 2});  // no other rank
  sender.send({number, 50, 2, 2});
  sender.send({number, 50, -1, 2});
  sender.send({number, 50, 1, 2}, 4);  // cut short
  sender.send({number, 50, 1, 2}, 0);
  sender.send({number, 3, 1, 0});  // the one that is meant
  while (job[0].moves_of_others() == 0 && !HasFailure()) hear(job[0]);
  EXPECT_EQ(job[0].moves_of_others(), 3);
  EXPECT_EQ(job[0].alarm(), Alarm::none);
}

TEST(HeartbeatTest, WithoutASocketARankIsDeafAndMute) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit none{0, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  Heartbeat zero(0, 2);
  Heartbeat one(1, 2);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_EQ(zero.socket(), -1);
  EXPECT_EQ(zero.address(), "0 0");
  Heartbeat hears(1, 2);
  for (Heartbeat* heart : {&zero, &one, &hears}) {
    heart->call(zero.address());
    heart->tell(5, Alarm::none);
    heart->hear();
    EXPECT_EQ(heart->moves_of_others(), 0);
    EXPECT_THAT(heart->silent(1000, 1), IsEmpty());
  }
}

TEST(HeartbeatTest, JobsOnOneHostDoNotMeet) {
  const Heartbeat first(0, 2);
  const Heartbeat second(0, 2);
  EXPECT_NE(Address(first).port, Address(second).port);
  EXPECT_NE(Address(first).job, Address(second).job);
}

}  // namespace
}  // namespace dattn::comm
