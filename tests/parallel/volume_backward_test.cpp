// Bytes on the wire of backward passes, against closed formulas and brute force.
#include <cstdio>

#include "tests/parallel/volume.hpp"
#include "tests/sanitized.hpp"

namespace dattn {
namespace {

Index backward_side(const Sizes& s, bool keys) {
  return keys ? s.kv + s.dkv : s.q + s.d_o + s.stats + s.dq;
}

TEST(BackwardVolume, OfARingIsTheLighterSideAndItsGradients) {
  for (const Heads heads : {Heads{6, 2, 3}, Heads{6, 6, 6}, Heads{8, 1, 1}, Heads{4, 4, 2}}) {
    for (int ranks = 1; ranks <= 16; ++ranks) {
      for (const Wire wire : kWires) {
        const Case c{{16 * ranks, 16 * ranks, heads.query, heads.key, heads.value, 5, 7},
                     "causal",
                     "zigzag",
                     "ring",
                     line(ranks),
                     Type::f4,
                     wire};
        const Sizes own = sizes(c, 16);
        expect_each(c, (ranks - 1) * std::min(backward_side(own, true), backward_side(own, false)),
                    Pass::backward);
      }
    }
  }
}

TEST(BackwardVolume, OfARingWhereNothingDivides) {
  // A shard's inputs stop before they come back; its gradients begin at the first guest.
  for (int ranks = 1; ranks <= 16; ++ranks) {
    for (const Lengths l : {Lengths{37, 37}, Lengths{3, 29}, Lengths{23, 9}, Lengths{1, 1}}) {
      const Wire wire = kWires[ranks % 2];
      const Type type = wire == Wire::exact ? Type::f8 : Type::bf16;
      const Case c{
          {l.queries, l.keys, 6, 2, 3, 5, 7}, "full", "striped", "ring", line(ranks), type, wire};
      const Problem problem = c.problem();
      const bool keys =
          backward_side(sizes(c, l.keys), true) <= backward_side(sizes(c, l.queries), false);
      const Partition& tokens = keys ? problem.keys() : problem.queries();
      const Rehearsal found = rehearsed(c, Pass::backward);
      for (int r = 0; r < ranks; ++r) {
        const int right = right_neighbour(problem, r);
        if (right == r) {  // it is alone, or owns nothing
          EXPECT_EQ(found.bytes_sent[static_cast<std::size_t>(r)], 0) << c.text();
          continue;
        }
        const Sizes inputs = sizes(c, tokens.tokens() - tokens.rows(right).size());
        const Sizes sums = sizes(c, tokens.tokens() - tokens.rows(r).size());
        EXPECT_EQ(found.bytes_sent[static_cast<std::size_t>(r)],
                  keys ? inputs.kv + sums.dkv : inputs.q + inputs.d_o + inputs.stats + sums.dq)
            << c.text() << ", rank " << r;
      }
    }
  }
}

TEST(BackwardVolume, OfARingIsSaidWithTheChoice) {
  const auto note = [](Heads heads) {
    const Case c{shape_of({8, 8}, heads), "full", "contiguous", "ring", line(4)};
    return c.how().backward(c.problem(), 1).note;
  };
  // Per token 2 (4 + 4) numbers of one key head, 4 + 4 + 2 + 4 of one query head; 8 tokens.
  EXPECT_EQ(note({1, 1, 1}),
            "Q, dO, Stats, dQ go around, 448 bytes a hop of all; K, V, dK, dV would be 512");
  EXPECT_EQ(note({2, 1, 1}),
            "K, V, dK, dV go around, 512 bytes a hop of all; Q, dO, Stats, dQ would be 896");
}

TEST(BackwardVolume, OfARingOfRoundedSumsIsMessagesToTheirOwners) {
  const Case c{shape_of({60, 60}, {4, 2, 2}, 5, 7),
               "full",
               "contiguous",
               "ring",
               line(5),
               Type::f4,
               Wire::bf16};
  const Rehearsal found = rehearsed(c, Pass::backward);
  const Sizes shard = sizes(c, 12);
  for (const auto& [link, bytes] : found.links) {
    // Four shards of K and V pass on to the right; every other rank gets what it is given.
    const bool right = link.second == (link.first + 1) % 5;
    EXPECT_EQ(bytes, shard.dkv + (right ? 4 * shard.kv : 0)) << link.first << " " << link.second;
  }
  EXPECT_EQ(found.links.size(), 20U);
}

TEST(BackwardVolume, OfStagingIsWhatOneSlotSendsOrReceives) {
  const auto staging = [](Case c, Pass pass) {
    c.wire = Wire::bf16;
    const std::vector<Index> rounded = rehearsed(c, pass).memory_bytes;
    c.wire = Wire::exact;
    return rounded.front() - rehearsed(c, pass).memory_bytes.front();
  };
  const auto wide = [](std::string_view strategy) {
    return Case{{96, 96, 8, 4, 4, 5, 7}, "full", "zigzag", strategy, line(4), Type::f4, Wire::bf16};
  };
  const Sizes own = sizes(wide("ring"), 24);
  // A ring has three homes for sums of keys, two to send from and one to receive in.
  EXPECT_EQ(staging(wide("ring"), Pass::backward), 3 * own.dkv);
  EXPECT_EQ(staging(wide("ring"), Pass::forward), 0);
  EXPECT_EQ(staging(wide("tree"), Pass::forward), 0);
  // Three quarters of the records of one's heads leave, and as many of one's rows arrive.
  EXPECT_EQ(staging(wide("ulysses"), Pass::forward), 2 * own.o * 3 / 4);
}

TEST(BackwardVolume, OfGatherIsWhatOthersNeedAndItsGradients) {
  const auto total = [](const Needed& needed) {
    return std::accumulate(needed.by_owner.begin(), needed.by_owner.end(), Index{0}) +
           std::accumulate(needed.by_reader.begin(), needed.by_reader.end(), Index{0});
  };
  int by_keys = 0;
  int by_queries = 0;
  std::size_t turn = 0;
  for (const int ranks : {2, 3, 4, 7}) {
    for (const PartitionKind& partition : partition_kinds()) {
      for (const Heads heads : {Heads{4, 2, 2}, Heads{6, 3, 2}, Heads{2, 2, 2}}) {
        for (const Lengths l : {Lengths{23, 23}, Lengths{5, 23}, Lengths{23, 9}}) {
          const Shape shape = shape_of(l, heads, 5, 7);
          for (const std::string& mask : masks(shape)) {
            if (turn++ % (kSanitized ? 7 : 1) != 0) continue;
            Case c{shape, mask, partition.name, "gather", line(ranks)};
            for (const Wire wire : kWires) {
              c.wire = wire;
              // Keys and values, and their gradients back, or what belongs to queries: the fewer.
              Needed keys = needed_bytes(c.problem());
              if (wire == Wire::bf16) {
                for (Index& bytes : keys.by_reader) bytes /= 2;
              }
              const Needed queries = needed_query_bytes(c.problem());
              const Needed& fewer = total(queries) < total(keys) ? queries : keys;
              (total(queries) < total(keys) ? by_queries : by_keys) += 1;
              const Rehearsal found = rehearsed(c, Pass::backward);
              for (std::size_t r = 0; r < found.bytes_sent.size(); ++r) {
                EXPECT_EQ(found.bytes_sent[r], fewer.by_owner[r] + fewer.by_reader[r])
                    << c.text() << ", rank " << r;
              }
            }
          }
        }
      }
    }
  }
  // Neither side is always the fewer.
  EXPECT_GT(by_keys, 100);
  EXPECT_GT(by_queries, 100);
}

TEST(BackwardVolume, OfLightSeqUnderCausalIsHalfTheRings) {
  for (int ranks = 1; ranks <= 16; ++ranks) {
    for (const Heads heads : {Heads{4, 4, 4}, Heads{8, 2, 4}, Heads{8, 2, 2}}) {
      Case c{shape_of({16 * ranks, 16 * ranks}, heads, 6, 6), "causal", "contiguous", "lightseq",
             line(ranks)};
      const Sizes own = sizes(c, 16);
      const Index keys = backward_side(own, true);
      const Index queries = backward_side(own, false);
      const Moved moved = eighths(ranks);
      const Index sent = rehearsed(c, Pass::backward).bytes_sent_total();
      EXPECT_EQ(8 * sent, moved.kv * std::min(keys, queries) + moved.help * std::max(keys, queries))
          << c.text();
      if (heads.query != heads.key) continue;
      // A ring of K, V, dK and dV, as elsewhere, sends more than twice as much.
      EXPECT_LE(2 * sent, ranks * (ranks - 1) * keys) << c.text();
      if (ranks != 8) continue;
      c.strategy = "ring";
      const auto of_all = [&](Index bytes) {
        return static_cast<double>(sent) / static_cast<double>(bytes);
      };
      std::printf(
          "  MHA, 8 ranks, backward: lightseq sends %.3f of our ring, %.3f of one of K, V, dK, "
          "dV\n",
          of_all(rehearsed(c, Pass::backward).bytes_sent_total()),
          of_all(ranks * (ranks - 1) * keys));
    }
  }
}

TEST(BackwardVolume, OfUlyssesFallsWithRanks) {
  for (const int ranks : {1, 2, 4, 8, 16}) {
    for (const Wire wire : kWires) {
      const Case c{{8 * ranks, 8 * ranks, 16, 4, 4, 5, 7},
                   "causal",
                   "zigzag",
                   "ulysses",
                   line(ranks),
                   Type::f4,
                   wire};
      const Sizes own = sizes(c, 8);
      const Index rho = std::max(1, ranks / 4);  // key heads are replicated beyond 4 ranks
      const Index queries = own.q + own.d_o + own.stats + own.dq;
      expect_each(c, (ranks - 1) * (queries + (own.kv + own.dkv) * rho) / ranks, Pass::backward);
      const Index rest = own.d_o + own.stats + own.dq + own.dkv * rho;  // Q, K and V are kept
      expect_each(c, (ranks - 1) * rest / ranks, Pass::backward, true);
    }
  }
}

TEST(BackwardVolume, OfUlyssesWhereNothingDivides) {
  // Each member sends its rows for the others' heads, and its heads' gradients for the others'
  // rows.
  for (int ranks = 1; ranks <= 16; ++ranks) {
    for (const Heads heads : head_counts()) {
      const Wire wire = kWires[ranks % 2];
      const Case c{shape_of({37, 37}, heads, 5, 7),
                   "full",
                   "contiguous",
                   "ulysses",
                   line(ranks),
                   Type::f4,
                   wire};
      const Problem problem = c.problem();
      const auto queries = [&](Index j) { return queries_of_member(heads, ranks, j); };
      const auto key_numbers = [&](Index j) {
        return heads_read(heads, ranks, j, heads.key) * 5 +
               heads_read(heads, ranks, j, heads.value) * 7;
      };
      const Rehearsal found = rehearsed(c, Pass::backward);
      const Rehearsal kept = rehearsed(c, Pass::backward, true);
      for (int r = 0; r < ranks; ++r) {
        const auto at = static_cast<std::size_t>(r);
        const Index rows = problem.queries().rows(r).size();
        const Index sums =
            (37 - rows) * (queries(r).size() * 5 + key_numbers(r)) * (wire == Wire::bf16 ? 2 : 4);
        Index inputs = 0;  // dO and Stats
        Index again = 0;   // Q, K and V
        for (int j = 0; j < ranks; ++j) {
          if (j == r) continue;
          inputs += rows * queries(j).size() * (7 + 2) * 4;
          again += rows * (queries(j).size() * 5 + key_numbers(j)) * 4;
        }
        EXPECT_EQ(kept.bytes_sent[at], sums + inputs) << c.text() << ", rank " << r;
        EXPECT_EQ(found.bytes_sent[at], sums + inputs + again) << c.text() << ", rank " << r;
      }
    }
  }
}

TEST(BackwardVolume, OfUspIsUlyssesInsideAndARingOfTheGroupsShards) {
  for (const int ring : {1, 2, 3, 4}) {
    for (const int inner : {1, 2, 4, 8}) {
      for (const Wire wire : kWires) {
        const Case c = usp_case(ring, inner, wire);
        const Sizes own = sizes(c, 16);
        const Index rho = std::max(1, inner / 2);
        const Index keys = (own.kv + own.dkv) * rho;
        const Index queries = own.q + own.d_o + own.stats + own.dq;
        const Index around = (ring - 1) * std::min(keys, queries);
        expect_each(c, (inner - 1) * (queries + keys) / inner + around, Pass::backward);
        const Index kept = own.q + own.kv * rho;
        expect_each(c, (inner - 1) * (queries + keys - kept) / inner + around, Pass::backward,
                    true);
      }
    }
  }
}

TEST(BackwardVolume, IsSaidWithWhatIsKept) {
  // 2 ranks of 4 tokens, 2 heads of 4 numbers: by head a rank has Q, K and V of 8 tokens and 1
  // head.
  const Case c{shape_of({8, 8}, {2, 2, 2}), "full", "contiguous", "ulysses", line(2)};
  const Index by_head = 2 * 3 * 8 * 4 * 4;
  const auto note = [&](bool keeps) {
    return c.how().backward(c.problem().keeping(keeps), 1).note;
  };
  EXPECT_EQ(note(true), "Q, K, V by head are kept, " + std::to_string(by_head) +
                            " bytes of a group; to send them again is " +
                            std::to_string(by_head / 2));
  EXPECT_EQ(note(false), "Q, K, V are sent again, " + std::to_string(by_head / 2) +
                             " bytes in a group; to keep them by head takes " +
                             std::to_string(by_head));
}

TEST(BackwardVolume, OfTreeIsOneAllReduceOfDqAndTheStats) {
  for (const int ranks : {1, 2, 3, 4, 6, 8, 12}) {
    const Case c{{12, 96, 6, 2, 2, 4, 7}, "causal", "contiguous", "tree", line(ranks), Type::f4,
                 kWires[ranks % 2]};  // no wire changes an all-reduce
    const Rehearsal found = rehearsed(c, Pass::backward);
    for (int r = 0; r < ranks; ++r) {
      const Index own = c.problem().queries().rows(r).size();
      EXPECT_EQ(found.bytes_sent[static_cast<std::size_t>(r)],
                2 * (ranks - 1) * sizes(c, 12).q / ranks + (ranks - 1) * sizes(c, own).stats);
    }
  }
}

TEST(BackwardVolume, OfLinksAddsUp) {
  std::vector<Case> all = cases(5, 29);
  for (Case& c : wire_cases(5)) all.push_back(std::move(c));
  for (const Case& c : all) {
    if (c.strategy == "tree") continue;
    const Rehearsal found = rehearsed(c, Pass::backward);
    std::vector<Index> sent(5, 0);
    for (const auto& [link, bytes] : found.links)
      sent[static_cast<std::size_t>(link.first)] += bytes;
    EXPECT_EQ(sent, found.bytes_sent) << c.text();
  }
}

}  // namespace
}  // namespace dattn
