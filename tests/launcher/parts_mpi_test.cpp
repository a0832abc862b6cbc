// The parts of `dattn run` that need ranks but no files: verdicts, shared failures, generated
// inputs.
#include <gtest/gtest.h>

#include <cmath>

#include "launcher/options.hpp"
#include "launcher/remedy.hpp"
#include "launcher/report.hpp"
#include "launcher/together.hpp"
#include "launcher/verify.hpp"
#include "parallel/engine.hpp"
#include "parallel/stats.hpp"
#include "tests/mpi_main.hpp"

namespace dattn {
namespace {

const Shape kShape{37, 37, 4, 2, 2, 8, 5};

/// A ring's result on this rank, as `dattn run` has it before the check.
struct Computed {
  Shape shape;
  Problem problem;
  Source source;
  Block delivers;
  std::vector<float> o, lse;
  double scale = 0.25;

  explicit Computed(const char* mask, const Shape& of = kShape, Compensate how = Compensate::off)
      : shape(of),
        problem(Problem(of, parse_mask(mask, of), line(comm::world().size()), "striped")
                    .compensating(how)),
        source(Source::random(of, 3)) {
    const Program program = find_strategy("ring")->program(problem, comm::world().rank());
    Engine<comm::Communicator> engine(problem, program, comm::world(), {.score = {.scale = scale}});
    const auto load = [&](Kind kind, SlotId slot, const Partition& tokens) {
      const Block& block = program.slots[static_cast<std::size_t>(slot)].block;
      source.read(kind, tokens.positions(block.rows),
                  reinterpret_cast<float*>(engine.input(slot).data()));
    };
    load(Kind::Q, program.input(Kind::Q), problem.queries());
    load(Kind::K, program.input(Kind::K), problem.keys());
    load(Kind::V, program.input(Kind::V), problem.keys());
    engine.run();
    delivers = program.result(Kind::O).block;
    lse.resize(static_cast<std::size_t>(delivers.row_count() * shape.query_heads));
    o.resize(lse.size() * static_cast<std::size_t>(shape.d_v));
    engine.result(std::span(o), std::span(lse));
  }

  Verdict verdict() {
    return verify<float>(comm::world(), problem, delivers, source, {.score = {.scale = scale}}, o,
                         lse);
  }
};

TEST(Verify, PassesWhatIsRight) {
  Computed computed("window:3,0+causal");
  const Verdict verdict = computed.verdict();
  EXPECT_TRUE(verdict.passed()) << text(verdict);
  EXPECT_EQ(verdict.rows, kShape.queries);
  EXPECT_NE(text(verdict).find("...... PASSED"), std::string::npos);
}

TEST(Verify, FailsOneWrongNumberOnOneRank) {
  Computed computed("causal");
  const bool last = comm::world().rank() == comm::world().size() - 1;
  if (last) computed.o.back() += 1e-3F;
  const Verdict verdict = computed.verdict();
  EXPECT_FALSE(verdict.passed()) << text(verdict);
  EXPECT_NE(text(verdict).find("FAILED"), std::string::npos);
}

TEST(Verify, FailsAWrongLse) {
  Computed computed("causal");
  if (comm::world().rank() == 0) computed.lse.front() += 1e-4F;
  EXPECT_FALSE(computed.verdict().passed());
}

TEST(Verify, FailsNanAndMissingEmptyRows) {
  Computed computed("causal");
  if (comm::world().rank() == 0) computed.o.front() = std::nanf("");
  EXPECT_FALSE(computed.verdict().passed());
  Computed empty("sink:0");  // no row has a key
  EXPECT_TRUE(empty.verdict().passed());
  if (comm::world().rank() == 0) empty.lse.front() = 0;
  EXPECT_FALSE(empty.verdict().passed());
}

TEST(Verify, FailsWithoutItsPseudoKeys) {
  const Shape shape{5, 37, 4, 2, 2, 8, 5};
  for (const Compensate how : {Compensate::head, Compensate::rank}) {
    Computed computed("window:6,0", shape, how);
    EXPECT_TRUE(computed.verdict().passed()) << text(computed.verdict());
    computed.problem = computed.problem.compensating(Compensate::off);
    EXPECT_FALSE(computed.verdict().passed());
    Computed plain("window:6,0", shape);
    EXPECT_TRUE(plain.verdict().passed()) << text(plain.verdict());
    plain.problem = plain.problem.compensating(how);
    EXPECT_FALSE(plain.verdict().passed());
    if (comm::world().size() == 1) continue;  // the same formula
    const bool by_head = how == Compensate::head;
    computed.problem = computed.problem.compensating(by_head ? Compensate::rank : Compensate::head);
    EXPECT_FALSE(computed.verdict().passed());
  }
}

/// The gradients of a Computed, of dO out of the same seed.
struct Trained {
  Computed forward;
  Block keys;
  std::vector<float> dq, dk, dv;

  explicit Trained(const char* mask) : forward(mask) {
    forward.source.add_d_o(Index{3});
    const Problem& problem = forward.problem;
    const Program program = find_strategy("ring")->backward(problem, comm::world().rank());
    Engine<comm::Communicator> engine(problem, program, comm::world(),
                                      {.score = {.scale = forward.scale}});
    std::vector<float> d_o(forward.o.size());
    forward.source.read(Kind::dO, problem.queries().positions(forward.delivers.rows), d_o.data());
    for (const SlotId slot : program.inputs) {
      const Block& block = program.slots[static_cast<std::size_t>(slot)].block;
      auto* to = reinterpret_cast<float*>(engine.input(slot).data());
      const Index rows = block.row_count();
      if (block.kind == Kind::Stats) {
        fill_stats<float>({forward.o.data(), rows, kShape.query_heads, kShape.d_v}, forward.lse,
                          {d_o.data(), rows, kShape.query_heads, kShape.d_v},
                          {to, rows, kShape.query_heads, 2});
        continue;
      }
      const Partition& tokens = of_queries(block.kind) ? problem.queries() : problem.keys();
      forward.source.read(block.kind, tokens.positions(block.rows), to);
    }
    engine.run();
    for (const auto& [kind, out] :
         {std::pair{Kind::dQ, &dq}, std::pair{Kind::dK, &dk}, std::pair{Kind::dV, &dv}}) {
      const Block& block = program.result(kind).block;
      if (kind == Kind::dK) keys = block;
      out->resize(static_cast<std::size_t>(block.row_count() * heads_of(kind, kShape) *
                                           dim_of(kind, kShape)));
      engine.gradient(kind, std::span(*out));
    }
  }

  GradientVerdict verdict() {
    return verify_gradients<float>(comm::world(), forward.problem, forward.delivers, keys,
                                   forward.source, {.score = {.scale = forward.scale}},
                                   {forward.o, forward.lse, dq, dk, dv});
  }
};

TEST(VerifyGradients, PassesWhatIsRight) {
  for (const char* mask : {"window:3,0+causal", "full", "window:0,0", "sink:0"}) {
    Trained trained(mask);
    const GradientVerdict verdict = trained.verdict();
    EXPECT_TRUE(verdict.passed()) << mask << ": " << text(verdict);
    EXPECT_EQ(verdict.query_rows, kShape.queries);
    EXPECT_EQ(verdict.key_rows, kShape.keys);
    EXPECT_NE(text(verdict).find("...... PASSED"), std::string::npos);
  }
}

TEST(VerifyGradients, FailsOneWrongNumberOfEachOnOneRank) {
  Trained trained("causal");
  const bool last = comm::world().rank() == comm::world().size() - 1;
  for (std::vector<float>* wrong : {&trained.dq, &trained.dk, &trained.dv}) {
    if (last) wrong->back() += 1e-3F;
    const GradientVerdict verdict = trained.verdict();
    EXPECT_FALSE(verdict.passed()) << text(verdict);
    EXPECT_NE(text(verdict).find("FAILED"), std::string::npos);
    if (last) wrong->back() -= 1e-3F;
  }
  ASSERT_TRUE(trained.verdict().passed());
  if (last) trained.dv.back() = std::nanf("");
  EXPECT_FALSE(trained.verdict().passed());
}

TEST(Together, AllRanksLearnOfTheLowestFailure) {
  comm::Communicator& all = comm::world();
  EXPECT_NO_THROW(together(all, [] {}));
  const int guilty = all.size() - 1;
  try {
    together(all, [&] {
      if (all.rank() == guilty) throw Failure(Exit::input, "'x.npy' is missing");
    });
    FAIL();
  } catch (const JobFailure& e) {
    EXPECT_EQ(e.rank, guilty);
    EXPECT_EQ(e.code, Exit::input);
    EXPECT_STREQ(e.what(), "'x.npy' is missing");
  }
  try {
    together(all, [] { throw std::bad_alloc(); });
    FAIL();
  } catch (const JobFailure& e) {
    EXPECT_EQ(e.rank, 0);
    EXPECT_EQ(e.code, Exit::memory);
  }
}

TEST(Source, GeneratedRowsDependOnTheirPlaceAlone) {
  const Source source = Source::random(kShape, 5);
  const Index row = kShape.key_heads * kShape.d_qk;
  std::vector<float> all(static_cast<std::size_t>(kShape.keys * row));
  source.read(Kind::K, {{0, kShape.keys, 1}}, all.data());
  std::vector<float> some(static_cast<std::size_t>(3 * row));
  source.read(Kind::K, {{4, 2, 7}, {30, 1, 1}}, some.data());
  for (const auto& [at, position] : {std::pair<Index, Index>{0, 4}, {1, 11}, {2, 30}}) {
    for (Index i = 0; i < row; ++i) {
      EXPECT_EQ(some[static_cast<std::size_t>(at * row + i)],
                all[static_cast<std::size_t>(position * row + i)]);
    }
  }
  double sum = 0;
  double squares = 0;
  for (const float x : all) {
    sum += static_cast<double>(x);
    squares += static_cast<double>(x) * static_cast<double>(x);
  }
  const auto n = static_cast<double>(all.size());
  EXPECT_NEAR(sum / n, 0, 0.2);  // 592 numbers: mean within 5 sigma, variance likewise
  EXPECT_NEAR(squares / n, 1, 0.3);
  std::vector<float> values(static_cast<std::size_t>(kShape.value_heads * kShape.d_v));
  source.read(Kind::V, {{0, 1, 1}}, values.data());
  EXPECT_NE(values.front(), all.front());
}

template <class T>
void expect_same_numbers_by_threads(const Source& source, const Shape& shape) {
  const Runs positions{{7, 900, 1}, {2000, 101, 3}};  // more than a MiB
  const auto read = [&](int threads) {
    std::vector<T> numbers(
        static_cast<std::size_t>(size(positions) * shape.key_heads * shape.d_qk));
    source.read(Kind::K, positions, numbers.data(), threads);
    return numbers;
  };
  const std::vector<T> one = read(1);
  for (const int threads : {2, 3, 8}) {
    EXPECT_EQ(std::memcmp(read(threads).data(), one.data(), one.size() * sizeof(T)), 0) << threads;
  }
}

TEST(Source, ThreadsChangeNoNumber) {
  const Shape shape{4096, 4096, 16, 16, 16, 64, 64};
  Source source = Source::random(shape, 5);
  expect_same_numbers_by_threads<float>(source, shape);
  expect_same_numbers_by_threads<double>(source, shape);
  source.round_to_bfloat16();
  expect_same_numbers_by_threads<BFloat16>(source, shape);
}

TEST(Options, TextOutputsNeedNoFile) {
  using Words = std::vector<std::string>;
  EXPECT_EQ(with_default_files({"--json"}), (Words{"--json", "-"}));
  EXPECT_EQ(with_default_files({"--json", "--check"}), (Words{"--json", "-", "--check"}));
  EXPECT_EQ(with_default_files({"--json", "f", "--csv"}), (Words{"--json", "f", "--csv", "-"}));
  EXPECT_EQ(with_default_files({"--out", "f"}), (Words{"--out", "f"}));
}

TEST(Remedy, MoreHostsThanTheJobHasAreHostsOfThePlanToo) {
  const Shape shape{4096, 4096, 8, 8, 8, 128, 128};
  Setting job;
  job.task.shape = shape;
  job.task.mask_words = "full";
  job.task.mask = parse_mask("full", shape);
  job.task.source = Source::random(shape, 1);
  job.task.type = Type::bf16;
  job.task.wish.strategy = "ulysses";
  job.task.wish.hosts = parse_hosts("2x2", 4);
  job.threads.assign(4, 1);
  // How much kernels need is the instruction set's: some bound is such that only more hosts help.
  const auto with = [&](Index bytes) {
    job.rooms = {{"MemAvailable", "a", true, {{0, 1}, bytes}},
                 {"MemAvailable", "b", true, {{2, 3}, bytes}}};
    return remedy(job);
  };
  const auto first = [&](const std::string& words) {
    std::string advice;
    for (Index bytes = Index{120} << 20; bytes > 0; bytes -= Index{2} << 20) {
      advice = with(bytes);
      if (advice.find(words) != std::string::npos) break;
    }
    return advice;
  };
  EXPECT_EQ(first(" on 8 hosts"), "16 ranks on 8 hosts");
  job.task.hosts = "2x2";  // which says how many ranks there are
  EXPECT_EQ(first("--tokens"), "--tokens 2K");
}

TEST(Report, RanksComeThroughTheirText) {
  RankReport rank;
  rank.host = {"a", 7, "0-3", 4, {{"MemAvailable", 1024, true}}};
  rank.threads = 2;
  rank.runs.push_back({1.5, 1.25, 0.125, 0.25, 99, 60, 3, {}, {50, 30, 10}});
  rank.backward_runs.push_back({2.5, 1.25, 0.125, 0.25, 198, 0, 3, {}});
  const RankReport same = decoded(encoded(rank));
  EXPECT_EQ(same.host.name, "a");
  EXPECT_EQ(same.host.cpus, "0-3");
  EXPECT_EQ(same.host.limits.front().left, 1024);
  EXPECT_EQ(same.runs.front().bytes_sent, 99);
  EXPECT_EQ(same.runs.front().between_hosts, 60);
  EXPECT_EQ(same.runs.front().messages, 3);
  EXPECT_EQ(same.runs.front().wait, 0.125);
  EXPECT_EQ(same.runs.front().moved.viewed, 50);
  EXPECT_EQ(same.runs.front().moved.copied, 30);
  EXPECT_EQ(same.runs.front().moved.abroad, 10);
  EXPECT_EQ(same.of(Pass::backward).front().bytes_sent, 198);
  EXPECT_EQ(in_bytes(1023), "1023 B");
  EXPECT_EQ(in_bytes(1536), "1.5 KiB");
}

}  // namespace
}  // namespace dattn
