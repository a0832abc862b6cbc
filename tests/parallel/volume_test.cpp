// Bytes on the wire, against closed formulas and brute force.
#include "tests/parallel/volume.hpp"

namespace dattn {
namespace {

TEST(Volume, OfARingIsEveryShardButTheRightNeighbours) {
  for (const std::string_view partition : {"contiguous", "zigzag", "striped", "balanced"}) {
    for (int ranks = 1; ranks <= 16; ++ranks) {
      const Case even{
          {16 * ranks, 16 * ranks, 6, 2, 3, 5, 7}, "causal", partition, "ring", line(ranks)};
      expect_each(even, (ranks - 1) * sizes(even, 16).kv);
      for (const Index n : {1, ranks, 37}) {
        const Case c{{n, n, 6, 2, 3, 5, 7}, "full", partition, "ring", line(ranks), Type::f8};
        const Problem problem = c.problem();
        const Rehearsal found = rehearsed(c);
        for (int r = 0; r < ranks; ++r) {
          const Index right = problem.keys().rows((r + 1) % ranks).size();
          EXPECT_EQ(found.bytes_sent[static_cast<std::size_t>(r)], sizes(c, n - right).kv)
              << c.text() << ", rank " << r;
        }
      }
    }
  }
}

TEST(Volume, OfUlyssesFallsWithRanks) {
  for (const int ranks : {1, 2, 4, 8, 16}) {
    const Case c{
        {8 * ranks, 8 * ranks, 16, 4, 4, 5, 7}, "causal", "zigzag", "ulysses", line(ranks)};
    const Sizes own = sizes(c, 8);
    const Index rho = std::max(1, ranks / 4);  // key heads are replicated beyond 4 ranks
    expect_each(c, (ranks - 1) * (own.q + own.kv * rho + own.o) / ranks);
  }
}

TEST(Volume, OfUlyssesWhereNothingDivides) {
  for (int ranks = 1; ranks <= 16; ++ranks) {
    for (const Heads heads : head_counts()) {
      const Case c{shape_of({37, 37}, heads, 5, 7), "full", "contiguous", "ulysses", line(ranks)};
      const Problem problem = c.problem();
      const Rehearsal found = rehearsed(c);
      // Query heads of member j: floor(j H / P) to floor((j+1) H / P).
      const auto queries = [&](Index j) {
        return Range{j * heads.query / ranks, (j + 1) * heads.query / ranks};
      };
      const auto read = [&](Index j, Index count) {  // of `count` key or value heads
        std::vector<bool> seen(static_cast<std::size_t>(count), false);
        for (Index h = queries(j).begin; h < queries(j).end; ++h) {
          seen[static_cast<std::size_t>(h * count / heads.query)] = true;
        }
        return std::count(seen.begin(), seen.end(), true);
      };
      for (int r = 0; r < ranks; ++r) {
        const Index rows = problem.queries().rows(r).size();
        Index numbers = (37 - rows) * queries(r).size() * (7 + 2);  // Partials of others' rows
        for (int j = 0; j < ranks; ++j) {
          if (j == r) continue;
          numbers +=
              rows * (queries(j).size() * 5 + read(j, heads.key) * 5 + read(j, heads.value) * 7);
        }
        EXPECT_EQ(found.bytes_sent[static_cast<std::size_t>(r)], numbers * 4)
            << c.text() << ", rank " << r;
      }
    }
  }
}

TEST(Volume, OfUspIsUlyssesInsideAndARingOfTheGroupsShards) {
  for (const int ring : {1, 2, 3, 4}) {
    for (const int inner : {1, 2, 4, 8}) {
      const int ranks = ring * inner;
      const Case c{{16 * ranks, 16 * ranks, 8, 2, 2, 5, 7},
                   "causal",
                   "zigzag",
                   "usp",
                   {{{"ring", ring}, {"heads", inner}}}};
      const Sizes own = sizes(c, 16);
      // A member holds the rows of its whole group and 1/U of the (replicated) heads: of a group
      // of U shards that is one shard, rho times over.
      const Index kv = own.kv * std::max(1, inner / 2);
      expect_each(c, (inner - 1) * (own.q + kv + own.o) / inner + (ring - 1) * kv);
    }
  }
}

TEST(Volume, OfTreeIsOneAllReduceOfRecords) {
  for (const int ranks : {1, 2, 3, 4, 6, 8, 12}) {
    const Case c{{4, 96, 6, 2, 2, 5, 7}, "causal", "contiguous", "tree", line(ranks)};
    expect_each(c, 2 * (ranks - 1) * sizes(c, 4).o / ranks);
  }
  // Where records do not divide, the sum is still exact.
  for (int ranks = 1; ranks <= 16; ++ranks) {
    const Case c{{1, 29, 5, 1, 1, 5, 7}, "full", "striped", "tree", line(ranks)};
    EXPECT_EQ(rehearsed(c).bytes_sent_total(), 2 * (ranks - 1) * sizes(c, 1).o);
  }
}

TEST(Volume, OfGatherUnderCausalAgainstTheRing) {
  for (int ranks = 2; ranks <= 16; ++ranks) {
    Case c{{16 * ranks, 16 * ranks, 6, 2, 2, 5, 7}, "causal", "contiguous", "gather", line(ranks)};
    const Index ring = ranks * (ranks - 1) * sizes(c, 16).kv;
    EXPECT_EQ(2 * rehearsed(c).bytes_sent_total(), ring);
    c.partition = "zigzag";
    EXPECT_EQ(4 * rehearsed(c).bytes_sent_total(), 3 * ring);
  }
}

TEST(Volume, OfGatherIsWhatOthersNeed) {
  for (const int ranks : {2, 3, 4, 7}) {
    for (const PartitionKind& partition : partition_kinds()) {
      for (const Heads heads : {Heads{4, 2, 2}, Heads{6, 3, 2}, Heads{2, 2, 2}}) {
        for (const Lengths l : {Lengths{23, 23}, Lengths{5, 23}, Lengths{23, 9}}) {
          const Shape shape = shape_of(l, heads, 5, 7);
          for (const std::string& mask : masks(shape)) {
            const Case c{shape, mask, partition.name, "gather", line(ranks)};
            EXPECT_EQ(rehearsed(c).bytes_sent, needed_bytes(c.problem()).by_owner) << c.text();
          }
        }
      }
    }
  }
}

TEST(Volume, OfGatherOnAWindowIsTheHalo) {
  for (const int ranks : {2, 4, 5}) {
    for (const Index left : {0, 1, 5, 16, 20, 40}) {
      const Case c{{16 * ranks, 16 * ranks, 2, 2, 2, 4, 4},
                   "window:" + std::to_string(left) + ",0",
                   "contiguous",
                   "gather",
                   line(ranks)};
      Index rows = 0;  // of each rank's neighbours to the left, as far as there are any
      for (Index r = 0; r < ranks; ++r) rows += std::min(left, 16 * r);
      EXPECT_EQ(rehearsed(c).bytes_sent_total(), sizes(c, rows).kv) << c.text();
    }
  }
}

TEST(Volume, OfBfloat16IsHalfForInputsAndTheSameForSums) {
  const auto bytes = [](std::string_view strategy, Type type, Pass pass) {
    const Case c{{96, 96, 6, 2, 3, 5, 7}, "causal", "zigzag", strategy, line(4), type};
    return rehearsed(c, pass).bytes_sent_total();
  };
  EXPECT_EQ(2 * bytes("ring", Type::bf16, Pass::forward), bytes("ring", Type::f4, Pass::forward));
  EXPECT_EQ(bytes("tree", Type::bf16, Pass::forward), bytes("tree", Type::f4, Pass::forward));
  // Backward K and V make three hops, two bytes a number, and so do their gradients, four bytes.
  const Index kv = 96 * (2 * 5 + 3 * 7);
  EXPECT_EQ(bytes("ring", Type::bf16, Pass::backward), 3 * 2 * kv + 3 * 4 * kv);
}

TEST(Volume, OfLinksAddsUp) {
  for (const Case& c : cases(5, 29)) {
    const Rehearsal found = rehearsed(c);
    if (c.strategy == "tree") continue;
    std::vector<Index> sent(5, 0);
    for (const auto& [link, bytes] : found.links) {
      EXPECT_NE(link.first, link.second) << c.text();
      sent[static_cast<std::size_t>(link.first)] += bytes;
    }
    EXPECT_EQ(sent, found.bytes_sent) << c.text();
  }
}

}  // namespace
}  // namespace dattn
