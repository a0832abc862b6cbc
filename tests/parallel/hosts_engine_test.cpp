// The engine over threads, for ranks that are said to share hosts: within the bounds of all other
// plans, and forward with the bits of one host.
#include <gtest/gtest.h>

#include "tests/parallel/engine_cases.hpp"
#include "tests/parallel/on_all_ranks.hpp"

namespace dattn::testing {
namespace {

Case on_hosts(std::string_view strategy, const char* words, int ranks, const Heads& heads,
              const char* mask, std::string_view partition) {
  const Strategy& how = *find_strategy(strategy);
  const Hosts hosts = parse_hosts(words, ranks);
  const Shape shape = shape_of({29, 29}, heads, 4, 6);
  Case c{shape, mask, partition, how.name, mesh_across(how, hosts, ranks, shape)};
  c.hosts = hosts;
  return c;
}

const std::pair<const char*, int> kLayouts[] = {
    {"2x2", 4}, {"4x1", 4}, {"2+1+3", 6}, {"0,1,1,0,1", 5}};

TEST(EngineOnHosts, AgreesWithTheReference) {
  std::size_t turn = 0;
  for (const auto& [words, ranks] : kLayouts) {
    for (const char* strategy : {"gather", "gather", "double_ring", "usp", "ring", "ulysses",
                                 "tree", "mixed", "lightseq"}) {
      for (const char* mask : {"full", "causal", "window:3,0/sink:1@0-2;causal@3-5"}) {
        const auto partitions = partition_kinds();
        Case c = on_hosts(strategy, words, ranks, turn % 2 == 0 ? Heads{6, 2, 2} : Heads{6, 6, 6},
                          mask, partitions[turn % partitions.size()].name);
        if (c.how().refuses(c.problem())) continue;
        c.prefetch = turn % 3 == 0 ? 2 : 1;
        c.wire = turn % 4 == 1 ? Wire::bf16 : Wire::exact;
        ++turn;
        const Mode mode = turn % 2 == 0 ? Mode{"delayed", false, 5} : Mode{"rendezvous", true, 3};
        std::vector<std::string> troubles(static_cast<std::size_t>(ranks));
        on_all_ranks(ranks, mode, 11, [&](comm::Loopback::Endpoint& end) {
          const auto own = [](double x) { return x; };
          troubles[static_cast<std::size_t>(end.rank())] = trouble_with(c, end, true, own);
        });
        for (const std::string& trouble : troubles) ASSERT_EQ(trouble, "");
      }
    }
  }
}

TEST(EngineOnHosts, GathersForwardTheBitsOfOneHost) {
  for (const auto& [words, ranks] : kLayouts) {
    for (const char* mask : {"full", "causal", "window:3,0/sink:1@0-2;causal@3-5"}) {
      for (const char* partition : {"contiguous", "zigzag"}) {
        const Case c = on_hosts("gather", words, ranks, {6, 3, 2}, mask, partition);
        const Problem on_several = c.problem();
        const Problem on_one = on_several.across({});
        const Tensors<float> tensors(c.shape, 21);
        on_all_ranks(ranks, {"delayed", false, 5}, 7, [&](comm::Loopback::Endpoint& end) {
          const Outcome several = run_and_judge(on_several, c.how(), end, tensors, {});
          const Outcome one = run_and_judge(on_one, c.how(), end, tensors, {});
          EXPECT_EQ(several.bits, one.bits) << c.text() << ", rank " << end.rank();
        });
      }
    }
  }
}

}  // namespace
}  // namespace dattn::testing
