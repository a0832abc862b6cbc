// What is exchanged for heads, and back, goes from host to host once where several ranks of a host
// share key heads; and so do the Stats of tree.
#include "parallel/couriers.hpp"

#include <gtest/gtest.h>

#include <map>

#include "parallel/placement.hpp"
#include "parallel/rehearse.hpp"
#include "tests/cases.hpp"
#include "tests/parallel/interpreter.hpp"

namespace dattn {
namespace {

struct Layout {
  const char* words;
  int ranks;
};
const Layout kLayouts[] = {{"2x2", 4},         {"2+1+3", 6}, {"2x4", 8},
                           {"0,1,1,0,2,1", 6}, {"1+6", 7},   {"4x4", 16}};
constexpr Pass kPasses[] = {Pass::forward, Pass::backward};

using Links = std::map<std::pair<int, int>, Index>;

Case on_hosts(std::string_view strategy, const Layout& layout, Heads heads, const char* mask) {
  Case c{shape_of({37, 37}, heads, 5, 7), mask, "zigzag", strategy, line(layout.ranks)};
  c.hosts = parse_hosts(layout.words, layout.ranks);
  return c;
}

Rehearsal rehearsed(const Problem& problem, const Case& c, Pass pass) {
  Rehearsal found = rehearse(problem, make_plan(c.how(), problem, pass));
  EXPECT_FALSE(found.fault) << c.text() << name_of(pass) << ": " << found.fault->text();
  return found;
}

Links between(const Rehearsal& found) {
  Links links = found.host_links;
  std::erase_if(links, [](const auto& link) { return link.first.first == link.first.second; });
  return links;
}

/// Bytes of a kind between hosts if each (row, head) goes from its owner to each other host whose
/// ranks work on the head (or back) once.
void once(const Problem& problem, Kind kind, Links& links) {
  const Hosts& hosts = problem.hosts();
  const auto& heads = problem.placement(problem.ranks()).heads;
  const Index record = record_bytes(kind, problem.shape(), problem.type());
  for (int owner = 0; owner < problem.ranks(); ++owner) {
    const Partition& rows = of_queries(kind) ? problem.queries() : problem.keys();
    for (int host = 0; host < hosts.count(); ++host) {
      if (host == hosts.of(owner)) continue;
      std::vector<Range> all;
      for (const int rank : hosts.ranks(host)) {
        const Ranges some =
            heads_touched(kind, heads[static_cast<std::size_t>(rank)], problem.shape());
        all.insert(all.end(), some.begin(), some.end());
      }
      const Index bytes = size(union_of(std::move(all))) * rows.rows(owner).size() * record;
      if (bytes == 0) continue;
      links[is_sum(kind) ? std::pair(host, hosts.of(owner)) : std::pair(hosts.of(owner), host)] +=
          bytes;
    }
  }
}

TEST(Couriers, CarryWhatHeadsOfAHostShareOnce) {
  for (const Layout& layout : kLayouts) {
    for (const Heads heads : {Heads{12, 1, 1}, Heads{8, 2, 4}, Heads{6, 3, 2}, Heads{16, 16, 16}}) {
      for (const char* mask : {"full", "causal"}) {
        const Case c = on_hosts("ulysses", layout, heads, mask);
        const Problem problem = c.problem();
        for (const Pass pass : kPasses) {
          Links want;
          for (const Kind kind : input_kinds(pass)) once(problem, kind, want);
          for (const Kind kind : result_kinds(pass)) once(problem, kind, want);
          const Rehearsal found = rehearsed(problem, c, pass);
          EXPECT_EQ(between(found), want) << c.text() << ", " << name_of(pass);
          const Rehearsal flat = rehearsed(problem.relaying(false), c, pass);
          EXPECT_LE(found.bytes_between_hosts(), flat.bytes_between_hosts()) << c.text();
          EXPECT_EQ(found.bytes_sent_total(), flat.bytes_sent_total()) << c.text();
        }
      }
    }
  }
}

// With one key head each other host gets K and V once instead of once for each of its ranks.
TEST(Couriers, SaveTheCopiesOfOneKeyHead) {
  const Case c{{32, 32, 8, 1, 1, 5, 7}, "full", "contiguous", "ulysses", line(8)};
  const Problem problem = c.problem().across(parse_hosts("2x4", 8));
  const Index kv = 4 * (5 + 7) * 4;       // bytes that a rank owns
  const Index q_and_o = 4 * (5 + 9) * 4;  // of one head
  const auto bytes = [&](bool relays) {
    return rehearsed(problem.relaying(relays), c, Pass::forward).bytes_between_hosts();
  };
  EXPECT_EQ(bytes(false), 8 * 4 * (q_and_o + kv));
  EXPECT_EQ(bytes(true), 8 * 4 * q_and_o + 8 * kv);
}

TEST(Couriers, CarryTheStatsOfTreeOnce) {
  for (const Layout& layout : kLayouts) {
    const Case c = on_hosts("tree", layout, {6, 2, 2}, "causal");
    const Problem problem = c.problem();
    const Index hosts = problem.hosts().count();
    const Index rows = 37 * 6;
    const Index sums = 2 * (hosts - 1) * rows * record_bytes(Kind::dQ, c.shape, c.type);
    const Index stats = (hosts - 1) * rows * record_bytes(Kind::Stats, c.shape, c.type);
    EXPECT_EQ(rehearsed(problem, c, Pass::backward).bytes_between_hosts(), sums + stats)
        << c.text();
  }
}

// An interpreter that shares no code with the rehearsal.
TEST(Couriers, RunInAnyWeather) {
  for (const char* strategy : {"ulysses", "tree", "mixed"}) {
    for (const Layout& layout : kLayouts) {
      if (layout.ranks > 8) continue;
      const Case c = on_hosts(strategy, layout, {8, 2, 2}, "causal@0-3;window:1,0@4-7");
      const Problem problem = c.problem();
      ASSERT_FALSE(c.how().refuses(problem)) << *c.how().refuses(problem);
      for (const Pass pass : kPasses) {
        const Plan plan = make_plan(c.how(), problem, pass);
        for (const Weather weather : {Weather::Late, Weather::Random}) {
          EXPECT_EQ(interpret(problem, plan, weather, 5), "") << c.text() << name_of(pass);
        }
      }
    }
  }
}

}  // namespace
}  // namespace dattn
