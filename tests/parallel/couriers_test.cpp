// What is exchanged for heads, and back, goes from host to host once where several ranks of a host
// share key heads; and so do the Stats of tree, and what LightSeq's pieces share.
#include "parallel/couriers.hpp"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <set>

#include "parallel/placement.hpp"
#include "parallel/rehearse.hpp"
#include "parallel/schedule.hpp"
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

/// Bytes between hosts of what LightSeq's pieces need of other hosts and have for them: of each
/// head that several ranks of a host share all rows once, else piece by piece.
Links of_pieces(const Problem& problem, Pass pass) {
  const Hosts& hosts = problem.hosts();
  const Shape& shape = problem.shape();
  const Index unit = std::lcm(shape.query_heads / shape.key_heads,  // heads that share K and V
                              shape.query_heads / shape.value_heads);
  Links links;
  for (const bool queries : {true, false}) {
    const Side side = queries ? query_side(pass) : key_side(pass);
    for (Index h = 0; h < shape.query_heads; h += unit) {
      struct Needed {
        std::set<int> ranks;
        std::set<Index> once;
        Index all = 0;
      };
      std::map<std::pair<int, int>, Needed> needed;  // by owner and host
      for (const Piece& piece : problem.schedule(pass).pieces()) {
        const int owner = queries ? piece.queries : piece.keys;
        if (hosts.together(owner, piece.at) || !piece.heads.contains(h)) continue;
        Needed& some = needed[{owner, hosts.of(piece.at)}];
        some.ranks.insert(piece.at);
        for (const Range rows : queries ? Ranges{piece.rows} : keys_of(problem, piece)) {
          some.all += rows.size();
          for (Index row = rows.begin; row < rows.end; ++row) some.once.insert(row);
        }
      }
      for (const auto& [where, some] : needed) {
        const Index rows = some.ranks.size() > 1 ? std::ssize(some.once) : some.all;
        const int home = hosts.of(where.first);
        for (const bool back : {false, true}) {
          for (const Kind kind : back ? side.sums : side.inputs) {
            const Range heads = heads_touched(kind, {h, h + unit}, shape);
            links[back ? std::pair(where.second, home) : std::pair(home, where.second)] +=
                rows * heads.size() * record_bytes(kind, shape, problem.type());
          }
        }
      }
    }
  }
  return links;
}

TEST(Couriers, CarryWhatPiecesOfAHostShareOnce) {
  for (const Layout& layout : kLayouts) {
    for (const Heads heads : {Heads{4, 4, 4}, Heads{6, 3, 2}, Heads{8, 2, 2}}) {
      for (const char* mask : {"causal", "documents:20,9,8+causal", "window:6,0/sink:2"}) {
        for (const char* partition : {"contiguous", "balanced"}) {
          Case c = on_hosts("lightseq", layout, heads, mask);
          c.partition = partition;
          c.prefetch = heads.query == 6 ? 2 : 1;
          const Problem problem = c.problem();
          for (const Pass pass : kPasses) {
            Links want = of_pieces(problem, pass);
            std::erase_if(want, [](const auto& link) { return link.second == 0; });
            EXPECT_EQ(between(rehearsed(problem, c, pass)), want) << c.text() << name_of(pass);
          }
        }
      }
    }
  }
}

// Half of the bytes of each copying its own at 2 hosts of 4 ranks: of K, V, Q and what comes back
// each rank's once where it was twice in the mean.
TEST(Couriers, HalveLightSeq) {
  const Case c{{512, 512, 8, 8, 8, 16, 16}, "causal", "contiguous", "lightseq", line(8)};
  for (const auto& [words, least] : {std::pair{"2x4", 1.9}, {"4x2", 1.3}}) {
    const Problem problem = c.problem().across(parse_hosts(words, 8));
    for (const Pass pass : kPasses) {
      const auto bytes = [&](bool relays) {
        return static_cast<double>(
            rehearsed(problem.relaying(relays), c, pass).bytes_between_hosts());
      };
      EXPECT_GT(bytes(false), least * bytes(true)) << words << name_of(pass);
    }
  }
}

// An interpreter that shares no code with the rehearsal.
TEST(Couriers, RunInAnyWeather) {
  for (const char* strategy : {"ulysses", "tree", "mixed", "lightseq"}) {
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
