// Messages of ranks that see each other's memory, at every rank count that ctest starts it with.
#include "comm/windows.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <list>
#include <optional>
#include <random>

#include "comm/error.hpp"
#include "tests/mpi_main.hpp"

namespace dattn::comm {
namespace {

using ::testing::HasSubstr;

/// Groups of so many neighbouring ranks count as hosts; 0: the real ones.
Windows windows(int ranks_a_host, bool on = true) {
  Windows::Options options{on};
  if (ranks_a_host > 0) options.host = world().rank() / ranks_a_host;
  return {world(), options};
}

std::span<std::byte> span_of(const Memory& memory, std::int64_t bytes) {
  return {memory.get(), static_cast<std::size_t>(bytes)};
}

void fill(std::span<std::byte> bytes, std::uint32_t seed) {
  for (std::byte& b : bytes)
    b = static_cast<std::byte>((seed = seed * 1664525U + 1013904223U) >> 24U);
}

std::vector<std::byte> filled(std::int64_t bytes, std::uint32_t seed) {
  std::vector<std::byte> all(static_cast<std::size_t>(bytes));
  fill(all, seed);
  return all;
}

std::vector<std::byte> packed(const ConstStrips& strips) {
  std::vector<std::byte> all(static_cast<std::size_t>(total(strips)));
  pack(strips, all);
  return all;
}

/// One way to lay `bytes` out: whole, in pieces with gaps, or in several strips.
struct Layout {
  int kind;
  std::int64_t bytes;

  std::int64_t room() const { return 3 * bytes + 64; }
  Strips strips(std::byte* at) const {
    if (kind == 0 || bytes < 24) return {{at, 1, bytes, bytes}};
    const std::int64_t piece = bytes / (kind == 1 ? 4 : 12);
    const std::int64_t first = kind == 1 ? 4 : 3;
    Strips all{{at, first, piece, piece + 5}};
    std::int64_t done = first * piece;
    at += first * (piece + 5);
    while (done < bytes) {
      const std::int64_t next = std::min(bytes - done, piece);
      all.push_back({at, 1, next, next});
      at += next + 7;
      done += next;
    }
    return all;
  }
};

/// A message that is under way at one of its ends.
struct Pending {
  Windows::Request request;
  Memory memory;
  Strips strips;
  std::vector<std::byte> expected;  // of a receive
  bool lent;
};

/// Every rank goes through the same list of messages and posts its ends of them.
void long_talk(int ranks_a_host, unsigned seed) {
  Windows all = windows(ranks_a_host);
  const int here = all.rank();
  std::mt19937 bits(seed);
  const auto pick = [&](int below) {
    return static_cast<int>(bits() % static_cast<unsigned>(below));
  };
  for (int round = 0; round < 3; ++round) {
    std::list<Pending> pending;
    std::list<Pending> seen;  // views, and what was lent
    const auto finish = [&](std::list<Pending>::iterator one) {
      one->request.wait();
      if (const auto& view = one->request.view()) {
        one->strips = {
            {const_cast<std::byte*>(view->data), view->count, view->length, view->stride}};
      } else if (!one->expected.empty()) {
        EXPECT_EQ(packed(read_only(one->strips)), one->expected);
        return pending.erase(one);
      } else if (!one->lent) {
        // The bytes of a send that is done are the sender's again.
        unpack(std::vector<std::byte>(static_cast<std::size_t>(total(one->strips))), one->strips);
        return pending.erase(one);
      }
      seen.splice(seen.end(), pending, one++);
      return one;
    };
    for (int n = 0; n < 300; ++n) {
      const int from = pick(all.size());
      const int to = pick(all.size());
      const std::int64_t bytes = pick(4) == 0 ? pick(200000) : pick(100);
      const Layout out{pick(3), bytes};
      const Layout in{pick(3), bytes};
      const bool lends = pick(2) == 0;
      const bool borrows = pick(2) == 0;
      const bool in_window = pick(5) != 0;
      const bool waits = pick(4) == 0;
      const int which = pick(1000);
      const auto message_seed = static_cast<std::uint32_t>(n + 1000 * round);
      if (here == to) {  // first: a message of a rank to itself is no exception
        Pending& one = pending.emplace_back();
        one.memory = allocate(in.room());
        one.strips = in.strips(one.memory.get());
        one.expected = filled(bytes, message_seed);
        one.request =
            borrows ? all.borrow(one.strips, from, bytes / 4) : all.recv(one.strips, from);
      }
      if (here == from) {
        Pending& one = pending.emplace_back();
        one.memory = in_window ? all.allocate(out.room()) : allocate(out.room());
        one.strips = out.strips(one.memory.get());
        one.lent = lends;
        unpack(filled(bytes, message_seed), one.strips);
        const ConstStrips strips = read_only(one.strips);
        one.request = lends ? all.lend(strips, to) : all.send(strips, to);
      }
      if (!waits || pending.empty()) continue;
      auto one = pending.begin();
      std::advance(one, which % static_cast<int>(pending.size()));
      finish(one);
    }
    for (auto one = pending.begin(); one != pending.end();) one = finish(one);
    for (const Pending& one : seen) {
      if (one.expected.empty()) continue;
      EXPECT_EQ(packed(read_only(one.strips)), one.expected);
    }
    all.give_back();
    for (Pending& one : seen) {  // it may be written again
      if (!one.lent) continue;
      unpack(std::vector<std::byte>(static_cast<std::size_t>(total(one.strips))), one.strips);
    }
  }
}

TEST(Windows, ALongTalkOnOneHost) { long_talk(0, 1); }
TEST(Windows, ALongTalkOnHostsOfTwo) { long_talk(2, 2); }
TEST(Windows, ALongTalkOnHostsOfOne) { long_talk(1, 3); }

TEST(Windows, RanksOfThisMachineSeeEachOther) {
  const Windows all = windows(0);
  EXPECT_EQ(all.trouble(), "");
  for (int r = 0; r < all.size(); ++r) EXPECT_EQ(all.shares(r), r != all.rank());
}

TEST(Windows, WhatIsBorrowedIsLentOnAndStaysTheOwners) {
  Windows all = windows(0);
  constexpr std::int64_t kBytes = 100000;
  const Memory own = all.allocate(kBytes);
  const int right = (all.rank() + 1) % all.size();
  const int left = (all.rank() + all.size() - 1) % all.size();
  for (int run = 0; run < 2; ++run) {
    fill(span_of(own, kBytes), static_cast<std::uint32_t>(100 * run + all.rank()));
    ConstStrip now{own.get(), 1, kBytes, kBytes};
    const Memory unused = allocate(kBytes);
    std::memset(unused.get(), 0, kBytes);
    for (int hop = 1; hop < all.size(); ++hop) {
      Windows::Request in = all.borrow(strips_of(span_of(unused, kBytes)), left, 0);
      Windows::Request out = all.lend({now}, right);
      in.wait();
      out.wait();
      ASSERT_TRUE(in.view());
      now = *in.view();
      const int owner = (all.rank() + all.size() - hop) % all.size();
      EXPECT_EQ(packed({now}), filled(kBytes, static_cast<std::uint32_t>(100 * run + owner)));
    }
    EXPECT_EQ(packed(strips_of(std::span<const std::byte>(span_of(unused, kBytes)))),
              std::vector<std::byte>(kBytes));
    all.give_back();  // and the next run writes at once
  }
  const Windows::Moved moved = all.moved();
  EXPECT_EQ(moved.viewed, 2 * (all.size() - 1) * kBytes);
  EXPECT_EQ(moved.copied, 0);
  EXPECT_EQ(moved.abroad, 0);
}

/// More messages than a channel shows at once, all posted before any is received.
TEST(Windows, ManyMessagesWaitForTheirReceives) {
  Windows all = windows(0);
  constexpr int kMany = 200;
  const Memory own = all.allocate(kMany);
  fill(span_of(own, kMany), 5);
  const int right = (all.rank() + 1) % all.size();
  const int left = (all.rank() + all.size() - 1) % all.size();
  std::vector<Windows::Request> requests;
  for (int i = 0; i < kMany; ++i) {
    requests.push_back(all.send(ConstStrips{{own.get() + i, 1, 1, 1}}, right));
  }
  std::vector<std::byte> got(kMany);
  for (int i = 0; i < kMany; ++i) {
    EXPECT_FALSE(all.size() == 1 && requests[static_cast<std::size_t>(i)].test());
    requests.push_back(all.recv(Strips{{&got[static_cast<std::size_t>(i)], 1, 1, 1}}, left));
  }
  for (Windows::Request& request : requests) request.wait();
  EXPECT_EQ(got, filled(kMany, 5));
}

TEST(Windows, MemoryIsUsedAgain) {
  Windows all = windows(0);
  constexpr std::int64_t kBytes = 1 << 20;
  const int right = (all.rank() + 1) % all.size();
  const int left = (all.rank() + all.size() - 1) % all.size();
  for (int i = 0; i < 50; ++i) {
    const Memory own = all.allocate(kBytes);
    for (std::int64_t at = 0; all.shares(right) && at < kBytes; at += 4096) {
      ASSERT_EQ(own.get()[at], std::byte{0});  // not what lay there before
    }
    fill(span_of(own, 64), static_cast<std::uint32_t>(i));
    std::vector<std::byte> got(64);
    Windows::Request in = all.recv(strips_of(std::span(got)), left);
    Windows::Request out = all.send(ConstStrips{{own.get(), 1, 64, 64}}, right);
    in.wait();
    out.wait();
    EXPECT_EQ(got, filled(64, static_cast<std::uint32_t>(i)));
  }
}

/// Where a limit allows no more window memory, or none, MPI carries what lies elsewhere.
TEST(Windows, WithoutRoomMpiTakesItsPlace) {
  std::signal(SIGXFSZ, SIG_IGN);  // MPI itself may come to the limit
  rlimit old{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  for (const bool from_the_start : {false, true}) {
    std::optional<Windows> all;
    if (!from_the_start) all.emplace(windows(0));
    const rlimit small{4096, old.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
    if (from_the_start) all.emplace(windows(0));
    const Memory own = all->allocate(100000);
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
    EXPECT_EQ(all->trouble() != "", from_the_start && all->size() > 1);
    fill(span_of(own, 100000), 3);
    std::vector<std::byte> got(100000);
    const int right = (all->rank() + 1) % all->size();
    const int left = (all->rank() + all->size() - 1) % all->size();
    Windows::Request in = all->recv(strips_of(std::span(got)), left);
    Windows::Request out = all->lend(ConstStrips{{own.get(), 1, 100000, 100000}}, right);
    in.wait();
    out.wait();
    all->give_back();
    EXPECT_EQ(got, filled(100000, 3));
    EXPECT_EQ(all->moved().copied, 0);
  }
}

TEST(Windows, OffAllGoesThroughMpi) {
  Windows all = windows(0, false);
  for (int r = 0; r < all.size(); ++r) EXPECT_FALSE(all.shares(r));
  const Memory own = all.allocate(8);
  fill(span_of(own, 8), 1);
  std::vector<std::byte> got(8);
  Windows::Request in = all.borrow(strips_of(std::span(got)), all.rank(), 0);
  Windows::Request out = all.lend(ConstStrips{{own.get(), 1, 8, 8}}, all.rank());
  in.wait();
  out.wait();
  EXPECT_FALSE(in.view());
  EXPECT_EQ(got, filled(8, 1));
  EXPECT_EQ(all.moved().viewed + all.moved().copied + all.moved().abroad, 0);
}

// ---- when it goes wrong
// --------------------------------------------------------------------------

TEST(Windows, ASendThatNobodyReceivesTimesOut) {
  if (world().size() == 1) return;
  world().set_deadline(0.2);
  Windows all = windows(0);
  if (all.rank() == 0) {
    const Memory own = all.allocate(24);
    Windows::Request out = all.send(ConstStrips{{own.get(), 1, 24, 24}}, 1);
    try {
      out.wait();
      ADD_FAILURE();
    } catch (const Timeout& e) {
      EXPECT_THAT(e.what(), HasSubstr("send of 24 bytes to rank 1 at rank 0, in shared memory"));
    }
  }
  world().set_deadline(20);
  world().barrier();  // rank 0 has given up
}

TEST(Windows, AnotherLengthIsAMismatch) {
  if (world().size() == 1) return;
  Windows all = windows(0);
  const Memory own = all.allocate(24);
  if (all.rank() == 0) all.send(ConstStrips{{own.get(), 1, 24, 24}}, 1).wait();
  if (all.rank() == 1) {
    std::vector<std::byte> got(25);
    Windows::Request in = all.recv(strips_of(std::span(got)), 0);
    EXPECT_THROW(in.wait(), Mismatch);
    EXPECT_THROW(all.poll(), std::runtime_error);  // what follows would meet the wrong messages
  }
  world().barrier();
}

TEST(Windows, WhoHasLentWaitsForThoseThatHaveNotGivenBack) {
  if (world().size() == 1) return;
  world().set_deadline(0.2);
  Windows all = windows(0);
  const Memory own = all.allocate(24);
  std::vector<std::byte> got(24);
  if (all.rank() == 1) all.borrow(strips_of(std::span(got)), 0, 0).wait();
  if (all.rank() == 0) {
    all.lend(ConstStrips{{own.get(), 1, 24, 24}}, 1).wait();
    try {
      all.give_back();
      ADD_FAILURE();
    } catch (const Timeout& e) {
      EXPECT_THAT(e.what(), HasSubstr("end of rank 1's use of memory of rank 0"));
    }
  }
  world().set_deadline(20);
  world().barrier();
  if (all.rank() != 0) all.give_back();  // has lent nothing, and waits for nobody
}

/// Run by itself, with the job's end as its result: see CMakeLists.txt.
TEST(Windows, DISABLED_AReceiverDies) {
  Windows all = windows(0);
  const Memory own = all.allocate(1 << 20);
  Windows::Request out = all.send(ConstStrips{{own.get(), 1, 1 << 20, 1 << 20}}, all.size() - 1);
  if (all.rank() == all.size() - 1) std::raise(SIGKILL);
  out.wait();
}

}  // namespace
}  // namespace dattn::comm
