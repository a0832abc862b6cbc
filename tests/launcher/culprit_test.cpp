#include "launcher/culprit.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace dattn {
namespace {

using comm::Progress;
using Event = Progress::Event;
using Kind = Progress::Kind;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

// ---- what ranks were at when they wrote their records

Event step_of(int number) {
  return {
      .kind = Kind::step, .phase = "forward pass", .what = "recv kv", .step = number, .begin = 1};
}
Event message(int peer) {
  return {.kind = Kind::wait,
          .phase = "forward pass",
          .what = "receive",
          .peer = peer,
          .bytes = 24,
          .begin = 2};
}
Event collective(std::int64_t number, const char* what = "barrier",
                 const char* phase = "forward pass") {
  return {.kind = Kind::wait, .phase = phase, .what = what, .sequence = number, .begin = 2};
}
Event done(Event event) {
  event.end = 3;
  return event;
}

FlightRecord record(std::vector<Event> events) {
  return {.command = "dattn run",
          .host = "node1",
          .pid = 100,
          .now = 63,
          .seconds = 60,
          .events = std::move(events)};
}

/// Of ranks 0, 1, ...; with as many ranks.
FlightRecords records(std::vector<FlightRecord> all) {
  FlightRecords made;
  for (std::size_t r = 0; r < all.size(); ++r) {
    all[r].rank = static_cast<int>(r);
    all[r].ranks = static_cast<int>(all.size());
    made.ranks.emplace(all[r].rank, all[r]);
  }
  return made;
}

// ---- the signs, the surest first

TEST(CulpritTest, WhoFailed) {
  auto some = records({record({message(1)}), record({step_of(4)}), record({message(1)})});
  some.ranks[1].cause = Cause::failed;
  some.ranks[1].line = "step 4: message cut short";
  EXPECT_THAT(culprits(some),
              ElementsAre("rank 1 (node1, pid 100) failed: step 4: message cut short"));
}

TEST(CulpritTest, WhoLeftNoRecordOrACutOne) {
  auto some = records({record({message(3)}), {}, record({message(3)}), {}, record({message(0)})});
  some.ranks.erase(1);
  some.ranks.erase(3);
  some.unreadable = {"rank-00003.json"};
  EXPECT_THAT(culprits(some), ElementsAre(StartsWith("rank 1 left no record: it died"),
                                          AllOf(StartsWith("rank 3 left a record that is cut off"),
                                                HasSubstr("; ranks 0, 2 wait for it"))));
}

TEST(CulpritTest, WhoStoodStill) {
  auto some = records({record({message(1)}), record({message(0)})});
  some.ranks[1].paused = 7.25;
  EXPECT_THAT(culprits(some),
              ElementsAre(AllOf(StartsWith("rank 1 (node1, pid 100) stood still for 7.2 s"),
                                HasSubstr("; rank 0 waits for it"))));
}

TEST(CulpritTest, WhichLink) {
  auto some = records({record({message(2)}), record({message(0)}), record({message(1)})});
  some.ranks[2].host = "node2";
  some.ranks[0].silent = {2};
  some.ranks[2].silent = {0};
  EXPECT_THAT(culprits(some), ElementsAre(StartsWith("the link between node1 and node2: ")));
}

TEST(CulpritTest, SilenceInsideAHostIsNoLink) {
  auto some = records({record({message(1)}), record({step_of(4)})});
  some.ranks[0].silent = {1};
  EXPECT_THAT(culprits(some), ElementsAre(HasSubstr("waits for nobody and does not move")));
}

TEST(CulpritTest, WhoHangsInWorkOfItsOwn) {
  const auto some = records(
      {record({message(1)}), record({step_of(4), done(message(0))}), record({collective(3)})});
  EXPECT_THAT(culprits(some),
              ElementsAre(AllOf(StartsWith("rank 1 (node1, pid 100) waits for nobody"),
                                HasSubstr("forward pass, step 4 (recv kv), at work of its own"),
                                HasSubstr("; rank 0 waits for it"))));
}

TEST(CulpritTest, WhoStillMovedWhenItWasToldDoesNotHang) {
  auto some = records({record({collective(3)}), record({step_of(4)}), record({collective(3)})});
  some.ranks[1].told = true;
  some.ranks[1].seconds = 0;
  EXPECT_THAT(culprits(some), Not(ElementsAre(HasSubstr("waits for nobody"))));
}

TEST(CulpritTest, WhoIsAtAnotherCollective) {
  const auto some = records({record({collective(7)}), record({collective(7)}),
                             record({collective(8, "all-reduce")}), record({collective(7)})});
  EXPECT_THAT(culprits(some),
              ElementsAre(AllOf(StartsWith("rank 2 (node1, pid 100) is at another collective"),
                                HasSubstr("its number 8, all-reduce, where rank 0"),
                                HasSubstr("is at number 7, barrier"))));
}

TEST(CulpritTest, WithoutAMajorityBothCollectivesAreNamed) {
  const auto some = records({record({collective(7)}), record({collective(8)})});
  EXPECT_THAT(culprits(some),
              ElementsAre(AllOf(StartsWith("rank 0 "), HasSubstr("number 7, barrier, and rank 1"),
                                HasSubstr("one of them left one out"))));
}

TEST(CulpritTest, WhoIsBeyondACollective) {
  const auto some = records({record({collective(7)}), record({collective(7)}),
                             record({done(collective(7)), message(0)})});
  EXPECT_THAT(culprits(some),
              ElementsAre(AllOf(StartsWith("rank 2 (node1, pid 100) is beyond collective number 7"),
                                HasSubstr("waiting for a receive of 24 bytes from rank 0"))));
}

TEST(CulpritTest, WhoIsInAnotherPhase) {
  const auto some = records(
      {record({collective(7, "barrier", "output")}), record({message(0)}), record({message(1)})});
  EXPECT_THAT(culprits(some),
              ElementsAre(AllOf(StartsWith("rank 0 (node1, pid 100) is in another phase than most"),
                                HasSubstr("; rank 1 waits for it"))));
}

TEST(CulpritTest, WhoWaitsForAllWhereOthersWaitForIt) {
  const auto some = records({record({collective(7)}), record({message(0)}), record({message(0)})});
  EXPECT_THAT(
      culprits(some),
      ElementsAre(AllOf(StartsWith("rank 0 (node1, pid 100) is beyond what others wait for"),
                        HasSubstr("; ranks 1, 2 wait for it"))));
}

TEST(CulpritTest, WhomMostWaitFor) {
  const auto some = records({record({message(2)}), record({message(2)}), record({message(0)})});
  EXPECT_THAT(culprits(some), ElementsAre(AllOf(StartsWith("perhaps rank 2, forward pass"),
                                                HasSubstr("ranks 0, 1 wait for it"))));
  const auto circle = records({record({message(1)}), record({message(0)})});
  EXPECT_THAT(culprits(circle),
              ElementsAre(StartsWith("perhaps rank 0"), StartsWith("perhaps rank 1")));
}

TEST(CulpritTest, NobodyWhereAllWaitForAll) {
  const auto some = records({record({collective(7)}), record({collective(7)})});
  EXPECT_THAT(culprits(some),
              ElementsAre(StartsWith("no culprit: all ranks wait at the same place")));
}

/// Each sign in turn is added to records that have all the later ones.
TEST(CulpritTest, TheSurestSignDecides) {
  // Rank 0 to 2 wait for a message, or are elsewhere; ranks 3 and 4 are at collectives.
  auto some = records({record({message(1)}), record({message(0)}), record({message(1)}),
                       record({collective(7)}), record({collective(7)}), record({message(1)})});
  const auto now = [&] { return culprits(some).front(); };
  EXPECT_THAT(now(), StartsWith("perhaps rank 1"));
  some.ranks[2].events = {collective(7, "barrier", "output")};
  some.ranks[2].events.back().sequence = 7;
  EXPECT_THAT(now(), StartsWith("rank 2 (node1, pid 100) is in another phase"));
  some.ranks[4].events = {collective(8)};
  EXPECT_THAT(now(), StartsWith("rank 4 (node1, pid 100) is at another collective"));
  some.ranks[0].events = {step_of(4)};
  EXPECT_THAT(now(), StartsWith("rank 0 (node1, pid 100) waits for nobody"));
  some.ranks[1].host = "node2";
  some.ranks[0].silent = {1};
  EXPECT_THAT(now(), StartsWith("the link between node1 and node2"));
  some.ranks[3].paused = 5;
  EXPECT_THAT(now(), StartsWith("rank 3 (node1, pid 100) stood still"));
  some.ranks.erase(5);
  EXPECT_THAT(now(), StartsWith("rank 5 left no record"));
  some.ranks[1].cause = Cause::failed;
  EXPECT_THAT(now(), StartsWith("rank 1 (node2, pid 100) failed"));
}

TEST(CulpritTest, ARecordComesBackFromItsFile) {
  FlightRecord one = record({step_of(4), done(collective(3)), message(2)});
  one.silent = {5};
  one.told = true;
  const FlightRecord back = flight_record(nlohmann::json::parse(to_json(one).dump()));
  EXPECT_EQ(to_json(back), to_json(one));
  EXPECT_EQ(back.place(), one.place());
  EXPECT_EQ(
      back.place(),
      "forward pass, step 4 (recv kv), waiting for a receive of 24 bytes from rank 2 for 61.0 s");
}

}  // namespace
}  // namespace dattn
