// The all-reduce of ranks on several hosts, played with sets instead of numbers: every rank ends
// with the sum of all, from host to host go as few bytes as can be, and counts are those of the
// messages.
#include "parallel/reduction.hpp"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <set>

namespace dattn {
namespace {

struct Layout {
  const char* words;
  int ranks;
};
const Layout kLayouts[] = {{"2x2", 4},  {"4x1", 4},         {"2+1+3", 6}, {"2x4", 8},
                           {"3x5", 15}, {"0,1,1,0,2,1", 6}, {"1+12", 13}, {"7+5+1+2", 15}};

using Round = Reduction::Round;

/// What each member has of each record: the members whose numbers are in it.
using Held = std::vector<std::vector<std::set<int>>>;

/// Plays one round; whatever is sent is what the sender has when the round begins.
void play(const Reduction& how, Round round, Held& held) {
  const Held before = held;
  const int members = static_cast<int>(held.size());
  const bool sums = round == Round::sum_inside || round == Round::sum_between;
  for (int from = 0; from < members; ++from) {
    for (int to = 0; to < members; ++to) {
      for (const Range some : how.sent(round, from, to)) {
        for (Index r = some.begin; r < some.end; ++r) {
          const auto& sent = before[static_cast<std::size_t>(from)][static_cast<std::size_t>(r)];
          auto& got = held[static_cast<std::size_t>(to)][static_cast<std::size_t>(r)];
          if (!sums) got.clear();
          for (const int one : sent) EXPECT_TRUE(got.insert(one).second) << "added twice";
        }
      }
    }
  }
}

TEST(Reduction, GivesEveryRankTheSumOfAll) {
  for (const Layout& layout : kLayouts) {
    for (const Index records : {0, 1, 3, 17, 120, 121}) {
      const Hosts hosts = parse_hosts(layout.words, layout.ranks);
      // All ranks, and a group of some in another order.
      std::vector<int> all(static_cast<std::size_t>(layout.ranks));
      std::iota(all.begin(), all.end(), 0);
      for (const std::vector<int>& group : {all, std::vector<int>(all.rbegin(), all.rend() - 1)}) {
        const Reduction how(group, hosts, records, true);
        EXPECT_EQ(how.by_messages(), group.size() > 1);
        if (!how.by_messages()) continue;
        const int members = static_cast<int>(group.size());
        Held held(group.size(), std::vector<std::set<int>>(static_cast<std::size_t>(records)));
        std::set<int> everybody;
        for (int m = 0; m < members; ++m) {
          everybody.insert(m);
          for (auto& record : held[static_cast<std::size_t>(m)]) record = {m};
        }
        std::map<std::pair<int, int>, Index> sent;  // by member and host
        for (const Round round : Reduction::kRounds) {
          play(how, round, held);
          for (int from = 0; from < members; ++from) {
            Index received = 0;
            Index messages = 0;
            for (int to = 0; to < members; ++to) {
              sent[{from, how.host_of(to)}] += size(how.sent(round, from, to));
              received += size(how.sent(round, to, from));
              messages += how.sent(round, from, to).empty() ? 0 : 1;
              messages += how.sent(round, to, from).empty() ? 0 : 1;
            }
            EXPECT_LE(messages, how.messages(from)) << layout.words;
            if (round == Round::sum_inside || round == Round::sum_between) {
              EXPECT_LE(received, how.scratch(from)) << layout.words;
            }
          }
        }
        for (const auto& one : held) {
          for (const auto& record : one) EXPECT_EQ(record, everybody) << layout.words << records;
        }
        Index between = 0;
        Index total = 0;
        for (const auto& [link, count] : sent) {
          EXPECT_EQ(count, how.sent_to(link.first, link.second)) << layout.words << records;
          if (link.second != how.host_of(link.first)) between += count;
          total += count;
        }
        const Index h = std::ssize(how.by_host());
        EXPECT_EQ(between, 2 * (h - 1) * records) << layout.words;
        EXPECT_EQ(total, 2 * (members - 1) * records) << layout.words;
        Index counted = 0;
        for (int m = 0; m < members; ++m) counted += how.sent_by(m);
        EXPECT_EQ(counted, total);
      }
    }
  }
}

// Of 2 (H-1)/H of the records each host sends as much, whatever its ranks, if hosts divide them;
// and its ranks share that.
TEST(Reduction, SharesTheLinksOfHostsEvenly) {
  for (const Layout& layout : kLayouts) {
    const Hosts hosts = parse_hosts(layout.words, layout.ranks);
    std::vector<int> all(static_cast<std::size_t>(layout.ranks));
    std::iota(all.begin(), all.end(), 0);
    const Index h = hosts.count();
    const Index records = h * 420;
    const Reduction how(all, hosts, records);
    std::vector<Index> out(static_cast<std::size_t>(h));
    for (int m = 0; m < layout.ranks; ++m) {
      const Index sent = how.sent_by(m) - how.sent_to(m, how.host_of(m));
      out[static_cast<std::size_t>(how.host_of(m))] += sent;
      const Index share = 2 * (h - 1) * records / h / std::ssize(hosts.ranks(how.host_of(m)));
      EXPECT_NEAR(static_cast<double>(sent), static_cast<double>(share), static_cast<double>(h));
    }
    for (const Index bytes : out) EXPECT_EQ(bytes, 2 * (h - 1) * records / h) << layout.words;
  }
}

TEST(Reduction, TakesWhatItsLinksTake) {
  std::vector<int> all(8);
  std::iota(all.begin(), all.end(), 0);
  const Machine machine =
      parse_machine("latency=1e-5,bandwidth=1e9,overhead=0,net_latency=1e-3,net_bandwidth=1e6");
  const Index records = 4096;
  const double whole = 4096.0 * 8;  // bytes
  const auto seconds = [&](const char* words) {
    return Reduction(all, parse_hosts(words, 8), records).seconds(machine, 8);
  };
  EXPECT_NEAR(seconds("1"), 6e-5 + 2 * whole * 7 / 8 / 1e9, 1e-9);
  // Two hosts exchange all at once.
  EXPECT_NEAR(seconds("2x4"), 2 * (1e-5 + whole * 3 / 4 / 1e9) + 1e-3 + whole / 1e6, 1e-9);
  EXPECT_NEAR(seconds("4x2"), 2 * (1e-5 + whole / 2 / 1e9) + 2 * (1e-3 + whole * 3 / 4 / 1e6),
              1e-9);
  EXPECT_NEAR(seconds("8x1"), 2 * (1e-3 + whole * 7 / 8 / 1e6), 1e-9);
}

}  // namespace
}  // namespace dattn
