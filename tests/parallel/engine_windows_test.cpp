// The engine where ranks see each other's memory: the same bits as over MPI, on real and pretended
// hosts, and nothing copied that can be looked at.
#include <gtest/gtest.h>

#include <numeric>
#include <span>

#include "comm/digest.hpp"
#include "comm/windows.hpp"
#include "tests/mpi_main.hpp"
#include "tests/parallel/engine_cases.hpp"

namespace dattn::testing {
namespace {

using comm::Windows;

/// Groups of so many neighbouring ranks count as hosts; 0: the real ones.
Windows windows(int ranks_a_host) {
  Windows::Options options;
  if (ranks_a_host > 0) options.host = comm::world().rank() / ranks_a_host;
  return {comm::world(), options};
}

Index over_all_ranks(Index x) {
  comm::world().all_reduce_sum(std::span(&x, 1));
  return x;
}

/// What comes of two forward and two backward runs, each on other tensors, which the engine gets
/// as soon as it has run on those before; and what the last two runs were like.
struct Everything {
  std::vector<std::byte> bits;
  std::vector<RunTimes> times;
};

template <class T, class Transport>
Everything everything(const Case& c, Transport& transport, bool checked, int threads = 1) {
  const Shape& s = c.shape;
  EngineOptions options{.threads = threads,
                        .poll_every = 0,
                        .checked = checked,
                        .verify_wire = checked && comm::has_digest()};
  options.score.scale = 1 / std::sqrt(static_cast<double>(s.d_qk));
  Problem problem = c.problem();
  if (!make_program(c.how(), problem.keeping(true), 0, Pass::forward).kept.empty()) {
    problem = problem.keeping(true);
  }
  const bool gradients = c.compensate == Compensate::off;
  const Program first = make_program(c.how(), problem, transport.rank(), Pass::forward);
  Engine<Transport> before(problem, first, transport, options);
  std::optional<Program> second;
  std::optional<Engine<Transport>> after;
  if (gradients) {
    second = make_program(c.how(), problem, transport.rank(), Pass::backward);
    after.emplace(problem, *second, transport, options);
    for (const SlotId slot : second->inputs) {
      const auto kept = kept_slot(first, second->slots[static_cast<std::size_t>(slot)].block);
      if (kept) after->bind(slot, before.kept(*kept));
    }
  }
  Everything all;
  const auto add = [&](const auto& part) {
    const auto bytes = std::as_bytes(std::span(part));
    all.bits.insert(all.bits.end(), bytes.begin(), bytes.end());
  };
  const auto records =
      static_cast<std::size_t>(first.result(Kind::O).block.row_count() * s.query_heads);
  for (const unsigned seed : {21U, 22U}) {
    all.times.clear();
    const Tensors<T> tensors(s, seed);
    load(before, problem, first, tensors);
    all.times.push_back(before.run());
    std::vector<SumOf<T>> o(records * static_cast<std::size_t>(s.d_v));
    std::vector<SumOf<T>> lse(records);
    before.result(std::span(o), std::span(lse));
    add(o);
    add(lse);
    if (!gradients) continue;
    Outcome forward;
    forward.o.assign(o.begin(), o.end());
    forward.lse.assign(lse.begin(), lse.end());
    load(*after, problem, *second, tensors, &first);
    load_stats(*after, problem, *second, tensors, forward);
    all.times.push_back(after->run());
    add(gradient_bits<T>(*after, problem, *second));
  }
  return all;
}

template <class T>
std::string trouble_in(const Case& c, Windows& transport, bool checked) {
  const Everything got = everything<T>(c, transport, checked);
  const Everything want = everything<T>(c, comm::world(), checked);
  std::string trouble;
  if (got.bits != want.bits) trouble += " other bits than over MPI";
  for (std::size_t i = 0; i < got.times.size(); ++i) {
    const RunTimes& mine = got.times[i];
    const RunTimes& theirs = want.times[i];
    if (mine.bytes_sent != theirs.bytes_sent || mine.messages != theirs.messages) {
      trouble += " other messages than over MPI";
    }
    if (theirs.moved.viewed + theirs.moved.copied + theirs.moved.abroad != 0)
      trouble += " windows over MPI";
    const auto& [viewed, copied, abroad] = mine.moved;
    // All-reduces and pseudo-keys are the rest.
    const bool has_rest = c.strategy == "tree" || c.compensate != Compensate::off;
    if (viewed + copied + abroad > mine.bytes_sent ||
        (!has_rest && viewed + copied + abroad != mine.bytes_sent)) {
      trouble += " sent " + std::to_string(mine.bytes_sent) + " bytes: " + std::to_string(viewed) +
                 " viewed, " + std::to_string(copied) + " copied, " + std::to_string(abroad) +
                 " abroad";
    }
  }
  return trouble.empty() ? trouble : c.text() + " " + name_of(c.type) + ":" + trouble;
}

std::string trouble_with(const Case& c, Windows& transport, bool checked) {
  if (c.type == Type::bf16) return trouble_in<BFloat16>(c, transport, checked);
  if (c.type == Type::f4) return trouble_in<float>(c, transport, checked);
  return trouble_in<double>(c, transport, checked);
}

/// Every case on one of: one host, hosts of two ranks, hosts of one, of three; in turn.
void same_bits(const std::vector<Case>& all) {
  std::vector<Windows> hosts;
  for (const int ranks_a_host : {0, 2, 1, 3}) hosts.push_back(windows(ranks_a_host));
  std::size_t turn = 0;
  for (const Case& c : all) {
    EXPECT_EQ(trouble_with(c, hosts[turn % hosts.size()], turn / hosts.size() % 2 == 0), "")
        << "grouping " << turn % hosts.size();
    ++turn;
  }
}

TEST(EngineOverWindows, GivesTheSameBitsAsOverMpi) { same_bits(cases(comm::world().size(), 101)); }

TEST(EngineOverWindows, RoundedSumsAreTheSameBitsToo) {
  same_bits(wire_cases(comm::world().size()));
}

TEST(EngineOverWindows, PseudoKeysAreTheSameBitsToo) {
  same_bits(compensated_cases(comm::world().size()));
}

TEST(EngineOverWindows, EveryMeshOfTwoAxes) {
  std::vector<Case> all;
  for (const Mesh& mesh : meshes(comm::world().size())) {
    for (const std::string_view strategy : strategies_of_two_axes()) {
      all.push_back({{83, 83, 6, 2, 3, 8, 5}, "causal", "zigzag", strategy, mesh});
    }
  }
  same_bits(all);
}

TEST(EngineOverWindows, ThreadsThatShareSumsAndCopiesChangeNoBit) {
  const int ranks = comm::world().size();
  if (ranks < 2 || ranks > 3) GTEST_SKIP() << "slots of a MiB and more are for few ranks";
  Windows one_host = windows(0);
  one_host.copy_with(3);
  const Index tokens = ranks * 1000 + 1;
  const Shape shape{tokens, tokens, 8, 8, 8, 32, 32};
  for (const Strategy& strategy : strategies()) {
    const Case c{shape, "causal", "contiguous", strategy.name, strategy.mesh(ranks, shape)};
    if (strategy.refuses(c.problem())) continue;
    const Everything few = everything<float>(c, comm::world(), false);
    const Everything many = everything<float>(c, one_host, false, 3);
    EXPECT_TRUE(few.bits == many.bits) << c.text();
  }
}

TEST(EngineOverWindows, KeysAndValuesOnOneHostAreNeverCopied) {
  Windows one_host = windows(0);
  for (const std::string_view strategy : {"ring", "gather"}) {
    for (const std::string_view partition : {"contiguous", "zigzag", "striped"}) {
      const Case c{{83, 83, 6, 2, 3, 8, 5},
                   "causal",
                   partition,
                   strategy,
                   find_strategy(strategy)->mesh(comm::world().size(), {83, 83, 6, 2, 3, 8, 5})};
      const RunTimes forward = everything<float>(c, one_host, true).times.front();
      EXPECT_EQ(forward.moved.viewed, forward.bytes_sent) << c.text();
      EXPECT_EQ(forward.moved.copied, 0) << c.text();
      EXPECT_EQ(over_all_ranks(forward.bytes_sent) > 0, comm::world().size() > 1) << c.text();
    }
  }
}

}  // namespace
}  // namespace dattn::testing
