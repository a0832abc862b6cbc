// Plans for ranks that share hosts: right, each block once from host to host, and priced with what
// both classes of links take.
#include "parallel/hosts.hpp"

#include <gtest/gtest.h>

#include <set>
#include <stdexcept>

#include "parallel/passes.hpp"
#include "parallel/planner.hpp"
#include "tests/parallel/interpreter.hpp"
#include "tests/parallel/volume.hpp"
#include "tests/sanitized.hpp"

namespace dattn {
namespace {

constexpr Pass kPasses[] = {Pass::forward, Pass::backward};

/// Even, alone, ragged, scattered, many.
struct Layout {
  const char* words;
  int ranks;
  Hosts hosts() const { return parse_hosts(words, ranks); }
};
const Layout kLayouts[] = {{"2x2", 4},         {"4x1", 4}, {"2+1+3", 6}, {"1x8", 8},
                           {"0,1,1,0,2,1", 6}, {"2x4", 8}, {"3+1+4", 8}, {"0,1,0,1", 4}};

/// `strategy` with as many ranks, on these hosts.
Case on_hosts(std::string_view strategy, const Layout& layout, const Shape& shape,
              const std::string& mask, std::string_view partition) {
  const Strategy& how = *find_strategy(strategy);
  Case c{shape, mask, partition, how.name, mesh_across(how, layout.hosts(), layout.ranks, shape)};
  c.hosts = layout.hosts();
  return c;
}

TEST(HostWords, AreReadAndWritten) {
  EXPECT_EQ(parse_hosts("1", 5), Hosts());
  EXPECT_EQ(parse_hosts("1x5", 5), Hosts());
  EXPECT_EQ(parse_hosts("5", 5), parse_hosts("5x1", 5));
  EXPECT_EQ(parse_hosts("7,7,7", 3), Hosts());
  EXPECT_EQ(parse_hosts("2", 4), parse_hosts("2x2", 4));
  EXPECT_EQ(parse_hosts("2+2", 4), parse_hosts("2x2", 4));
  EXPECT_EQ(parse_hosts("9,9,3,3", 4), parse_hosts("2x2", 4));
  const Hosts ragged = parse_hosts("2+1+3", 6);
  EXPECT_EQ(ragged.count(), 3);
  EXPECT_EQ(ragged.each(), 0);
  EXPECT_EQ(ragged.ranks(2), (std::vector{3, 4, 5}));
  const Hosts scattered = parse_hosts("4,0,0,4", 4);
  EXPECT_EQ(scattered.of(0), 0);
  EXPECT_EQ(scattered.ranks(0), (std::vector{0, 3}));
  EXPECT_EQ(scattered.side_by_side({0, 1, 2, 3}), (std::vector{0, 3, 1, 2}));
  for (const Layout& layout : kLayouts) {
    EXPECT_EQ(parse_hosts(layout.hosts().text(), layout.ranks), layout.hosts()) << layout.words;
  }
}

TEST(HostWords, ComplainInOneLine) {
  for (const char* words :
       {"", "0", "x", "2x", "x2", "2x3", "3", "2+1", "2+0+2", "-1", "0,1", "2x2x1", "a", "1,,2,3",
        "4 ", "99999999999", "65536x65536", "2+2+", "0,1,2,3,4"}) {
    try {
      parse_hosts(words, 4);
      ADD_FAILURE() << words;
    } catch (const std::invalid_argument& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    }
  }
}

TEST(HostMesh, KeepsTheInnerAxisInsideHosts) {
  const Shape shape = shape_of({64, 64}, {4, 2, 2});
  for (const std::string_view name : strategies_of_two_axes()) {
    const Strategy& how = *find_strategy(name);
    for (const Layout& layout : {Layout{"2x4", 8}, Layout{"4x2", 8}, Layout{"3x4", 12},
                                 Layout{"0,1,2,0,1,2", 6}, Layout{"0,1,1,0", 4}}) {
      const Hosts hosts = layout.hosts();
      const Mesh mesh = mesh_across(how, hosts, layout.ranks, shape);
      EXPECT_EQ(mesh.ranks(), layout.ranks);
      EXPECT_EQ(mesh.axes[1].size, hosts.each()) << name << layout.words;
      for (int rank = 0; rank < layout.ranks; ++rank) {
        for (const int other : mesh.group(rank, 1)) {
          EXPECT_TRUE(hosts.together(rank, other)) << name << " " << layout.words;
        }
        EXPECT_EQ(mesh.group(rank, 0)[static_cast<std::size_t>(mesh.coordinate(rank, 0))], rank);
      }
    }
    // Where hosts are ragged, or nobody shares one, the mesh is that of one host.
    for (const Layout& layout : {Layout{"2+1+3", 6}, Layout{"6x1", 6}, Layout{"1", 6}}) {
      EXPECT_EQ(mesh_across(how, layout.hosts(), 6, shape), how.mesh(6, shape)) << layout.words;
    }
  }
  // An axis of heads has no more ranks than there are heads.
  const Shape two = shape_of({64, 64}, {2, 2, 2});
  EXPECT_EQ(mesh_across(*find_strategy("usp"), parse_hosts("2x4", 8), 8, two).text(), "4x2");
  EXPECT_EQ(mesh_across(*find_strategy("usp_inner_ring"), parse_hosts("4x2", 8), 8, two).text(),
            "2x4");
}

void expect_right(const Case& c, const Problem& problem) {
  for (const Planned& pass : plan_passes(c.how(), problem, kPasses)) {
    const Rehearsal& found = pass.rehearsal;
    ASSERT_FALSE(found.fault) << c.text() << ": " << found.fault->text();
    Index counted = 0;
    for (const auto& [hosts, bytes] : found.host_links) counted += bytes;
    EXPECT_EQ(counted, found.bytes_sent_total()) << c.text();
    if (c.strategy == "gather") {
      EXPECT_TRUE(found.dead.empty()) << c.text() << ": rank " << found.dead.front().first
                                      << ", step " << found.dead.front().second << " does nothing";
    }
  }
}

TEST(PlansOnHosts, AreRight) {
  std::vector<Layout> layouts(std::begin(kLayouts), std::end(kLayouts));
  layouts.insert(layouts.end(), {{"4x4", 16}, {"2x5", 10}, {"7+5", 12}, {"1+12", 13}});
  std::size_t turn = 0;
  for (const Layout& layout : layouts) {
    for (const Strategy& how : strategies()) {
      const std::size_t step = how.name == "gather" ? 1 : 5;
      for (const PartitionKind& partition : partition_kinds()) {
        const Shape probe = shape_of({37, 37}, {6, 3, 2}, 4, 6);
        const std::size_t most = masks(probe).size();
        for (std::size_t m = turn % step; m < most; m += step) {
          if (++turn % (kSanitized ? 7 : 1) != 0) continue;
          const auto all = lengths(layout.ranks);
          const Shape shape = shape_of(all[turn % all.size()], head_counts()[turn % 7], 4, 6);
          const auto words = masks(shape);
          Case c = on_hosts(how.name, layout, shape, words[m % words.size()], partition.name);
          c.prefetch = turn % 3 == 0 ? 2 : turn % 5 == 0 ? 4 : 1;
          c.wire = turn % 4 == 0 ? Wire::bf16 : Wire::exact;
          const Problem problem = c.problem();
          if (how.refuses(problem)) continue;
          expect_right(c, problem);
          if (how.relays) expect_right(c, problem.relaying(false));
        }
      }
    }
  }
}

// The interpreter shares no code with rehearse().
TEST(PlansOnHosts, Execute) {
  std::size_t turn = 0;
  for (const Layout& layout : kLayouts) {
    for (const char* mask : {"full", "causal", "window:3,0/sink:1", "causal@0-2;window:1,0@3-5"}) {
      for (const char* partition : {"zigzag", "contiguous"}) {
        Case c = on_hosts("gather", layout, shape_of({29, 29}, {6, 2, 2}), mask, partition);
        c.prefetch = ++turn % 3 == 0 ? 2 : 1;
        for (const Pass pass : kPasses) {
          const Problem problem = c.problem();
          const Plan plan = make_plan(c.how(), problem, pass);
          for (const Weather weather : {Weather::Late, Weather::Random}) {
            EXPECT_EQ(interpret(problem, plan, weather, 5), "") << c.text() << name_of(pass);
          }
        }
      }
    }
  }
}

/// What a rank attends to, in order, by Blocks.
std::vector<Block> attended(const Program& program) {
  std::vector<Block> blocks;
  for (const Step& step : program.steps) {
    if (const auto* attend = std::get_if<Attend>(&step)) {
      for (const SlotId s : {attend->q, attend->k, attend->v}) {
        blocks.push_back(program.slots[static_cast<std::size_t>(s)].block);
      }
    }
  }
  return blocks;
}

// So O and LSE have the same bits, however ranks share hosts.
TEST(PlansOnHosts, ComputeForwardWhatAndWhenOneHostDoes) {
  for (const Layout& layout : kLayouts) {
    for (const std::string& mask : masks(shape_of({37, 37}, {6, 2, 2}))) {
      for (const PartitionKind& partition : partition_kinds()) {
        const Case c =
            on_hosts("gather", layout, shape_of({37, 37}, {6, 2, 2}), mask, partition.name);
        const Problem problem = c.problem();
        for (int rank = 0; rank < layout.ranks; ++rank) {
          EXPECT_EQ(attended(make_program(c.how(), problem, rank, Pass::forward)),
                    attended(make_program(c.how(), problem.across({}), rank, Pass::forward)))
              << c.text();
        }
      }
    }
  }
}

/// Bytes of keys and values of each host that some rank of another one sees, by both, unit of
/// heads by unit, by brute force.
std::map<std::pair<int, int>, Index> needed_between(const Problem& problem) {
  const Shape& s = problem.shape();
  const Hosts& hosts = problem.hosts();
  const Index unit = std::lcm(s.query_heads / s.key_heads, s.query_heads / s.value_heads);
  const Index row_bytes =
      (unit * s.key_heads / s.query_heads * s.d_qk + unit * s.value_heads / s.query_heads * s.d_v) *
      bytes_of(problem.type());
  std::map<std::pair<int, int>, Index> bytes;
  for (Index h = 0; h < s.query_heads; h += unit) {
    std::set<std::pair<int, Index>> fetched;  // host, row
    for (int reader = 0; reader < problem.ranks(); ++reader) {
      const auto keys = seen(problem, reader, {h, h + unit});
      for (Index row = 0; row < s.keys; ++row) {
        const Index key = problem.keys().positions({{row, row + 1}}).front().first;
        const int owner = problem.keys().owner(row);
        if (hosts.together(owner, reader) || !keys[static_cast<std::size_t>(key)]) continue;
        if (!fetched.emplace(hosts.of(reader), row).second) continue;
        bytes[{hosts.of(owner), hosts.of(reader)}] += row_bytes;
      }
    }
  }
  return bytes;
}

/// Those of a rehearsal between hosts.
std::map<std::pair<int, int>, Index> between(const Rehearsal& found) {
  auto bytes = found.host_links;
  std::erase_if(bytes, [](const auto& link) { return link.first.first == link.first.second; });
  return bytes;
}

TEST(VolumeOnHosts, OfGatherIsWhatEachHostNeedsOnce) {
  for (const Layout& layout : kLayouts) {
    for (const PartitionKind& partition : partition_kinds()) {
      for (const Heads heads : {Heads{4, 2, 2}, Heads{6, 3, 2}}) {
        for (const Lengths l : {Lengths{23, 23}, Lengths{5, 23}}) {
          const Shape shape = shape_of(l, heads, 5, 7);
          const auto words = masks(shape);
          for (std::size_t m = 0; m < words.size(); m += 2) {
            const Case c = on_hosts("gather", layout, shape, words[m], partition.name);
            const Rehearsal found = rehearsed(c);
            EXPECT_EQ(between(found), needed_between(c.problem())) << c.text();
            // A courier may need less itself than all of its host, and gets the rest too.
            const Case one{shape, words[m], partition.name, "gather", line(layout.ranks)};
            EXPECT_GE(found.bytes_sent_total(), rehearsed(one).bytes_sent_total()) << c.text();
          }
        }
      }
    }
  }
}

// With R ranks a host each pair of hosts sends what one rank would have to send R others, once.
TEST(VolumeOnHosts, OfEachStrategyFromHostToHost) {
  for (const auto& [hosts, each] : {std::pair{2, 2}, {2, 4}, {4, 2}, {3, 4}, {4, 4}}) {
    const int ranks = hosts * each;
    const Shape shape{16 * ranks, 16 * ranks, 24, 12, 12, 5, 7};
    const std::string words = std::to_string(hosts) + "x" + std::to_string(each);
    const Hosts at = parse_hosts(words, ranks);
    const auto rehearse_on = [&](const char* strategy, Pass pass, bool relays = true) {
      const Strategy& how = *find_strategy(strategy);
      const Problem problem = Problem(shape, parse_mask("full", shape),
                                      mesh_across(how, at, ranks, shape), "contiguous")
                                  .across(at)
                                  .relaying(relays);
      Rehearsal found = rehearse(problem, make_plan(how, problem, pass));
      EXPECT_FALSE(found.fault) << strategy << words << found.fault->text();
      return found;
    };
    const Case c{shape, "full", "contiguous", "ring", line(ranks)};
    const Sizes own = sizes(c, 16);
    const Index h = hosts;
    const Index r = each;
    for (const auto& [pass, kv] :
         {std::pair{Pass::forward, own.kv}, std::pair{Pass::backward, own.kv + own.dkv}}) {
      // gather: all of a host once to each other host; else once to each rank there.
      const Rehearsal gather = rehearse_on("gather", pass);
      EXPECT_EQ(gather.bytes_between_hosts(), h * (h - 1) * r * kv) << words << name_of(pass);
      for (const auto& [link, bytes] : between(gather)) EXPECT_EQ(bytes, r * kv) << words;
      EXPECT_EQ(gather.bytes_sent_total(), ranks * (ranks - 1) * kv);
      EXPECT_EQ(std::ssize(between(gather)), h * (h - 1));
      EXPECT_EQ(rehearse_on("gather", pass, false).bytes_between_hosts(), h * (h - 1) * r * r * kv);
      // double_ring: H - 1 hops between hosts of what each rank has.
      EXPECT_EQ(rehearse_on("double_ring", pass).bytes_between_hosts(), h * (h - 1) * r * kv);
      // ring: of P - 1 hops of all ranks (backward one more for the sums, which start one later
      // and come home) the link between two hosts has one rank's part.
      const Index inputs = (h * r - 1) * own.kv * h;
      const Index sums = (h * r - 1) * own.dkv * h;
      EXPECT_EQ(rehearse_on("ring", pass).bytes_between_hosts(),
                pass == Pass::forward ? inputs : inputs + sums);
      // usp: rings between hosts only, of the part of the heads that each rank of a host has.
      EXPECT_EQ(rehearse_on("usp", pass).bytes_between_hosts(), h * (h - 1) * r * kv);
    }
    // ulysses: each rank sends each other one its part of the heads.
    const Case divided{
        {16 * ranks, 16 * ranks, 48, 48, 48, 5, 7}, "full", "contiguous", "ulysses", line(ranks)};
    const Problem exchanging = divided.problem().across(at);
    const Sizes part = sizes(divided, 16);
    EXPECT_EQ(rehearse(exchanging, make_plan(divided.how(), exchanging)).bytes_between_hosts(),
              (part.q + part.kv + part.o) * (ranks - r));
    // tree: what each host has summed up, to the others and back.
    const Shape few{4, 16 * ranks, 24, 12, 12, 5, 7};
    const Problem problem =
        Problem(few, parse_mask("full", few), line(ranks), "contiguous").across(at);
    const Index records = sizes({few, "full", "contiguous", "tree", line(ranks)}, 4).o;
    const Rehearsal tree = rehearse(problem, make_plan(*find_strategy("tree"), problem));
    EXPECT_EQ(tree.bytes_between_hosts(), 2 * (h - 1) * records);
    EXPECT_EQ(tree.bytes_sent_total(), 2 * (ranks - 1) * records);
  }
}

// Where ranks are dealt to hosts in turn, a ring still leaves each host once.
TEST(VolumeOnHosts, OfRingsDoesNotDependOnTheOrderOfRanks) {
  const Shape shape{96, 96, 6, 2, 2, 5, 7};
  for (const char* strategy : {"ring", "double_ring", "usp"}) {
    for (const Pass pass : kPasses) {
      const Case near = on_hosts(strategy, {"2x3", 6}, shape, "full", "contiguous");
      const Case scattered = on_hosts(strategy, {"0,1,0,1,0,1", 6}, shape, "full", "contiguous");
      EXPECT_EQ(between(rehearsed(near, pass)), between(rehearsed(scattered, pass))) << strategy;
    }
  }
}

TEST(ForecastOnHosts, PricesBothLinksAndSharesTheOneBetweenHosts) {
  // Two ranks of each host send to the other host at once: the link has both, one after the other.
  const Shape shape{64, 64, 2, 2, 2, 64, 64};
  const Machine machine = parse_machine(
      "latency=0,bandwidth=1e15,rate=1e15,overhead=0,net_latency=1e-3,net_bandwidth=1e6");
  const auto seconds = [&](const char* hosts, bool relays) {
    const Problem problem = Problem(shape, parse_mask("full", shape), line(4), "contiguous")
                                .across(parse_hosts(hosts, 4))
                                .relaying(relays);
    return rehearse(problem, make_plan(*find_strategy("gather"), problem), machine)
        .forecast_seconds();
  };
  const double kv = 16.0 * 2 * 128 * 4 / 1e6;  // of one rank, on the wire
  EXPECT_LT(seconds("1", true), 1e-6);
  // Of each host two blocks, to each of two ranks, or once; K and V are half of it each.
  EXPECT_NEAR(seconds("2x2", false), 4 * kv, 0.1 * kv + 4e-3);
  EXPECT_NEAR(seconds("2x2", true), 2 * kv, 0.1 * kv + 4e-3);
  EXPECT_NEAR(seconds("4x1", true), 3 * kv, 0.1 * kv + 4e-3);
  // The link of one rank, or of the whole host.
  const Machine even = parse_machine("net_latency=0,net_bandwidth=1e15", machine);
  EXPECT_LT(rehearse(Problem(shape, parse_mask("full", shape), line(4), "contiguous")
                         .across(parse_hosts("2x2", 4)),
                     make_plan(*find_strategy("ring"),
                               Problem(shape, parse_mask("full", shape), line(4), "contiguous")),
                     even)
                .forecast_seconds(),
            1e-6);
}

TEST(ForecastOnHosts, DecidesWhetherBlocksAreRelayed) {
  const Shape shape{4096, 4096, 8, 8, 8, 64, 64};
  const MaskPtr mask = parse_mask("causal", shape);
  Wish wish;
  wish.ranks = 8;
  wish.hosts = parse_hosts("2x4", 8);
  wish.partition = "contiguous";
  const Machine slow_net = parse_machine("bandwidth=1e10,rate=1e11,net_bandwidth=1e8");
  const Choice far = choose(wish, shape, mask, Type::f4, slow_net);
  EXPECT_EQ(far.problem->hosts(), wish.hosts);
  const auto bytes_out = [&](const Choice& choice) {
    return rehearse(*choice.problem, make_plan(*choice.strategy, *choice.problem), slow_net)
        .bytes_between_hosts();
  };
  // Whatever was chosen, no more than K and V of each host once.
  EXPECT_LE(bytes_out(far), 2 * 4 * 512 * 8 * 128 * 4) << far.strategy->name;
  // A strategy that was asked for relays.
  wish.strategy = "gather";
  EXPECT_TRUE(choose(wish, shape, mask, Type::f4, {}).problem->relays());
  wish.relays = false;
  EXPECT_FALSE(choose(wish, shape, mask, Type::f4, {}).problem->relays());
}

TEST(ForecastOnHosts, OfManyHostsIsChosenToo) {
  if (kSanitized) GTEST_SKIP() << "nothing new to sanitizers";
  const Shape shape{4096, 4096, 8, 2, 2, 64, 64};
  Wish wish;
  wish.ranks = 32;
  wish.hosts = parse_hosts("8x4", 32);
  const Machine slow_net = parse_machine("bandwidth=1e10,rate=1e11,net_bandwidth=1e8");
  const Choice choice = choose(wish, shape, parse_mask("causal", shape), Type::f4, slow_net);
  const auto with = [&](const Wish& other) {
    const Choice c = choose(other, shape, parse_mask("causal", shape), Type::f4, slow_net);
    return rehearse(*c.problem, make_plan(*c.strategy, *c.problem), slow_net).forecast_seconds();
  };
  Wish flat = wish;
  flat.strategy = "gather";
  flat.relays = false;
  EXPECT_LT(with(wish), 0.6 * with(flat)) << choice.strategy->name;
}

}  // namespace
}  // namespace dattn
