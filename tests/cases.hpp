// The table of cases: shapes x masks x partitions x strategies x ranks. Plan tests, MPI tests and
// benches all read it; a new strategy, partition or mask enters by its own table, a new kind of
// shape by a line here.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "parallel/strategies.hpp"
#include "tests/block_files.hpp"

namespace dattn {

/// One computation and one way to split it.
struct Case {
  Shape shape;
  std::string mask;  ///< words for parse_mask, with the files of block_files.hpp
  std::string_view partition;
  std::string_view strategy;
  Mesh mesh;
  Type type = Type::f4;
  Wire wire = Wire::exact;
  int prefetch = 1;
  Compensate compensate = Compensate::off;
  Hosts hosts = {};

  int ranks() const { return mesh.ranks(); }
  Problem problem() const {
    return Problem(shape, parse_mask(mask, shape, open_blocks), mesh, partition, type, wire)
        .prefetching(prefetch)
        .compensating(compensate)
        .across(hosts);
  }
  const Strategy& how() const { return *find_strategy(strategy); }

  /// E.g. "ring zigzag causal, 2x3 ranks, 13x13 tokens, heads 6:2:2, dims 4:4".
  std::string text() const {
    const auto s = [](Index i) { return std::to_string(i); };
    return std::string(strategy) + " " + std::string(partition) + " " + mask + ", " + mesh.text() +
           " ranks, " + s(shape.queries) + "x" + s(shape.keys) + " tokens, heads " +
           s(shape.query_heads) + ":" + s(shape.key_heads) + ":" + s(shape.value_heads) +
           ", dims " + s(shape.d_qk) + ":" + s(shape.d_v) +
           (wire == Wire::bf16 ? ", wire bf16" : "") +
           (prefetch > 1 ? ", " + s(prefetch) + " stages ahead" : "") +
           (compensate != Compensate::off ? std::string(", compensate ") + name_of(compensate)
                                          : "") +
           (hosts.count() > 1 ? ", hosts " + hosts.text() : "");
  }
};

/// Query, key and value heads: MHA, GQA, MQA, keys other than values, more of them than most
/// ranks, a single one.
struct Heads {
  Index query, key, value;
};
inline const std::vector<Heads>& head_counts() {
  static const std::vector<Heads> all{{4, 4, 4}, {6, 2, 2}, {5, 1, 1}, {6, 3, 2},
                                      {8, 1, 4}, {1, 1, 1}, {12, 4, 4}};
  return all;
}

/// Queries and keys of interest to `ranks` ranks: one token, fewer than ranks, as many, a prime,
/// what nothing divides evenly; fewer queries than keys (decoding) and more.
inline std::vector<Lengths> lengths(int ranks) {
  std::vector<Lengths> all{{1, 1}, {ranks, ranks}, {37, 37}, {4 * ranks + 3, 4 * ranks + 3}};
  all.insert(all.end(), {{3, 29}, {1, ranks + 1}, {23, 9}});
  if (ranks > 1) all.push_back({ranks - 1, ranks - 1});
  return all;
}

/// A batch of as many sequences as new tokens, or half as many, in one group or two; the keys that
/// are left belong to the last sequence.
inline std::string batch(const Shape& shape) {
  const auto s = [](Index i) { return std::to_string(i); };
  const Index fresh = shape.queries % 2 == 0 ? 2 : 1;
  const Index sequences = shape.queries / fresh;
  const Index groups = std::min<Index>(sequences, 2);
  const Index shared = shape.keys - shape.queries;
  const Index length = shared / (groups + 1);
  std::string words = "batch:sequences=" + s(sequences) + ",new=" + s(fresh);
  if (length > 0) words += ",levels=" + s(groups) + "x" + s(length);
  for (Index i = 0; i < sequences; ++i) {
    words += (i == 0 ? ",suffix=" : ":") +
             s(fresh + (i + 1 == sequences ? shared - groups * length : 0));
  }
  return words;
}

/// The masks for a shape: each kind alone, the usual compositions, and, given two heads or more, a
/// table of heads.
inline std::vector<std::string> masks(const Shape& shape) {
  const auto s = [](Index i) { return std::to_string(i); };
  const Index n = shape.keys;
  const std::string documents =  // uneven; the last one may be of length 0
      "documents:" + s(n / 2) + "," + s(n / 2 == n ? 0 : 1) + "," +
      s(n - n / 2 - (n / 2 == n ? 0 : 1));
  std::vector<std::string> all{"full",
                               "causal",
                               "window:3,0",
                               "window:2,2",
                               documents,
                               documents + "+causal",
                               "prefix:3",
                               "sink:2",
                               "window:3,0/sink:1",
                               "window:0,0",
                               "s2:block=3,local=1,stride=3,step=1",
                               "neighbor:dims=" + s(n) + ",window=" + s(std::min<Index>(n, 3)),
                               "dilated:3,1,2"};
  if (shape.queries <= n) all.push_back(batch(shape));
  const Index heads = shape.query_heads;
  all.push_back("causal+" + block_words(3, 2, shape.key_heads, n));
  if (heads > 1) {
    const std::string rest = "@" + s(heads / 2) + "-" + s(heads - 1);
    all.push_back("causal@0-" + s(heads / 2 - 1) + ";window:1,0" + rest);
    all.push_back("window:2,0/sink:1@0-" + s(heads / 2 - 1) + ";full" + rest);
  }
  return all;
}

inline Shape shape_of(Lengths l, Heads h, Index d_qk = 4, Index d_v = 4) {
  return {l.queries, l.keys, h.query, h.key, h.value, d_qk, d_v};
}

/// All that this many ranks can run: every strategy x partition x mask, each with every
/// `stride`-th of the shapes (lengths x heads), another one for each combination, so that every
/// shape meets every strategy. `stride` 1 is the full product. Types and stages ahead take turns.
inline std::vector<Case> cases(int ranks, std::size_t stride) {
  std::vector<Shape> shapes;
  for (const Lengths l : lengths(ranks)) {
    for (const Heads h : head_counts()) shapes.push_back(shape_of(l, h, 4, 6));
  }
  const std::size_t most = masks(shape_of({9, 9}, {2, 2, 2})).size();
  std::vector<Case> all;
  std::size_t turn = static_cast<std::size_t>(ranks);
  for (const Strategy& strategy : strategies()) {
    for (const PartitionKind& partition : partition_kinds()) {
      for (std::size_t m = 0; m < most; ++m) {
        for (std::size_t i = turn++ % stride; i < shapes.size(); i += stride) {
          const auto specs = masks(shapes[i]);
          const Type type = turn % 3 == 0 ? Type::f8 : turn % 3 == 1 ? Type::bf16 : Type::f4;
          const int prefetch = turn % 5 == 0 ? 2 : turn % 5 == 1 ? 4 : 1;
          Case c{shapes[i],
                 specs[m % specs.size()],
                 partition.name,
                 strategy.name,
                 strategy.mesh(ranks, shapes[i]),
                 type,
                 Wire::exact,
                 prefetch};
          if (!strategy.refuses(c.problem())) all.push_back(std::move(c));
        }
      }
    }
  }
  return all;
}

/// Every strategy with sums that travel in bfloat16. No case where most queries see a single key:
/// their gradients cancel to 0, and a bound relative to that is none.
inline std::vector<Case> wire_cases(int ranks) {
  std::vector<Case> all;
  std::size_t turn = static_cast<std::size_t>(ranks);
  for (const Strategy& strategy : strategies()) {
    for (const char* mask : {"full", "causal", "window:9,2", "documents:17,0,20+causal"}) {
      for (const Heads heads : {Heads{6, 2, 3}, Heads{6, 6, 6}}) {
        const Shape shape = shape_of({37, 37}, heads, 8, 5);
        const auto partitions = partition_kinds();
        Case c{shape,
               mask,
               partitions[turn % partitions.size()].name,
               strategy.name,
               strategy.mesh(ranks, shape),
               turn % 3 == 0 ? Type::bf16 : Type::f4,
               Wire::bf16};
        ++turn;
        if (!strategy.refuses(c.problem())) all.push_back(std::move(c));
      }
    }
  }
  return all;
}

/// Every strategy where queries drop keys, or might: heads by groups, uneven and none at all, with
/// pseudo-keys in turn of all ranks and of each.
inline std::vector<Case> compensated_cases(int ranks) {
  const std::vector<Lengths> lengths{{3, 29}, {1, 40}, {12, 31}, {1, ranks + 1}, {5, 5}, {7, 4}};
  const char* masks[] = {"stream:sink=2,recent=5",
                         "window:3,0",
                         "sink:0",
                         "causal",
                         "s2:block=3,local=1,stride=3,step=1",
                         "documents:1,"};
  std::vector<Case> all;
  std::size_t turn = static_cast<std::size_t>(ranks);
  for (const Strategy& strategy : strategies()) {
    // Every mask meets other shapes, types and kinds of pseudo-keys under the next partition.
    for (const PartitionKind& partition : partition_kinds()) {
      turn += 5;
      for (std::size_t i = 0; i < 6; ++i, ++turn) {
        const Shape shape =
            shape_of(lengths[turn / 2 % lengths.size()], head_counts()[turn % 7], 4, 6);
        std::string mask = masks[i];
        if (i == 5) mask += std::to_string(shape.keys - 1) + "+causal";
        if (i == 0 && shape.query_heads > 2) {
          mask += "@0;causal@1;stream:sink=1,recent=3@2-" + std::to_string(shape.query_heads - 1);
        }
        Case c{shape,
               mask,
               partition.name,
               strategy.name,
               strategy.mesh(ranks, shape),
               turn % 3 == 0   ? Type::f8
               : turn % 3 == 1 ? Type::bf16
                               : Type::f4};
        c.wire = c.type != Type::f8 && turn % 4 == 0 ? Wire::bf16 : Wire::exact;
        c.compensate = turn % 2 == 0 ? Compensate::head : Compensate::rank;
        if (!strategy.refuses(c.problem())) all.push_back(std::move(c));
      }
    }
  }
  return all;
}

/// Meshes of two axes with this many ranks.
inline std::vector<Mesh> meshes(int ranks) {
  std::vector<Mesh> all;
  for (int outer = 1; outer <= ranks; ++outer) {
    if (ranks % outer == 0) all.push_back({{{"outer", outer}, {"inner", ranks / outer}}});
  }
  return all;
}

/// Strategies that take such a mesh.
inline std::vector<std::string_view> strategies_of_two_axes() {
  std::vector<std::string_view> all;
  for (const Strategy& s : strategies()) {
    if (s.axes.find(',') != std::string_view::npos) all.push_back(s.name);
  }
  return all;
}

}  // namespace dattn
