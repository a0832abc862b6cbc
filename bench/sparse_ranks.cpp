#include "bench/sparse_ranks.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <ctime>
#include <functional>
#include <stdexcept>

#include "bench/contender.hpp"
#include "bench/measure.hpp"
#include "launcher/decode_check.hpp"
#include "launcher/together.hpp"
#include "parallel/decoder.hpp"
#include "parallel/passes.hpp"

namespace dattn {
namespace {

using comm::Communicator;

/// Time of a processor that this thread has had, in seconds: who shares it does not count.
double processor_seconds() {
  std::timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

Index sum_of(Communicator& world, Index mine) {
  std::array<std::int64_t, 1> sum{mine};
  world.all_reduce_sum(std::span<std::int64_t>(sum));
  return sum[0];
}
double most_of(Communicator& world, double mine) {
  std::array<double, 1> most{mine};
  world.all_reduce_max(most);
  return most[0];
}
double most_over_mean(Communicator& world, double mine) {
  std::array<double, 1> sum{mine};
  world.all_reduce_sum(sum);
  const double most = most_of(world, mine);
  return sum[0] > 0 ? most * world.size() / sum[0] : 1;
}

/// What takes turns with another.
struct Runner {
  std::function<RunTimes()> run;
  Index planned = 0;  ///< bytes that all ranks send, at rank 0
  Index sent = 0;     ///< as counted by the last run
  int times = 1;      ///< runs of a repeat
};

/// Collective: seconds of a run, of the slowest rank; the mean of several where they are short.
double timed(Communicator& world, Runner& side) {
  double seconds = 0;
  for (int i = 0; i < side.times; ++i) {
    world.barrier();
    const RunTimes mine = side.run();
    seconds += most_of(world, mine.seconds);
    if (i == 0) side.sent = sum_of(world, mine.bytes_sent);
  }
  return seconds / side.times;
}

void warm_up(Communicator& world, Runner& side) {
  timed(world, side);
  side.times = std::max(1, static_cast<int>(std::ceil(kLeastSeconds / timed(world, side))));
}

void require_planned(const Communicator& world, const Runner& side) {
  if (world.rank() != 0 || side.sent == side.planned) return;
  throw std::logic_error(
      fmt::format("ranks sent {} bytes, and the plan says {}", side.sent, side.planned));
}

/// Collective: both sides in turn; `after_each` follows each run of the sparse one.
void alternate(Communicator& world, Runner& sparse, Runner& dense, const SparseLimits& limits,
               const std::function<void()>& after_each, SparseRow& row) {
  warm_up(world, sparse);
  warm_up(world, dense);
  std::vector<double> found, dense_found, ratios;
  const double start = now();
  double before = timed(world, dense);
  for (int i = 0; i < limits.repeats; ++i) {
    const double spent = most_of(world, now() - start);
    if (i > 0 && limits.seconds > 0 && spent >= limits.seconds) break;
    found.push_back(timed(world, sparse));
    after_each();
    const double after = timed(world, dense);
    dense_found.push_back((before + after) / 2);
    ratios.push_back(dense_found.back() / found.back());
    before = after;
  }
  require_planned(world, sparse);
  require_planned(world, dense);
  row.repeats = static_cast<int>(ratios.size());
  row.seconds = median(found);
  row.dense_seconds = median(dense_found);
  row.speedup = median(ratios);
  row.bytes = sparse.sent;
  row.dense_bytes = dense.sent;
}

Type type_of(const Cell& cell) { return cell.dtype == "bf16" ? Type::bf16 : Type::f4; }

Task task_of(const Cell& cell, const std::string& words, const std::string& strategy,
             Index memory) {
  Task task;
  task.source = Source::random(cell.shape(), 1);
  task.shape = cell.shape();
  task.type = type_of(cell);
  if (task.type == Type::bf16) task.source.round_to_bfloat16();
  task.mask = parse_mask(words, task.shape);
  task.mask_words = words;
  task.scoring.score.scale = 1 / std::sqrt(static_cast<double>(cell.d));
  task.wish.strategy = strategy;
  task.wish.memory = memory;
  if (cell.kernel == "backward") {
    task.wish.gradients = true;
    task.source.add_d_o(2);
  }
  return task;
}

/// A strategy on a task: what is proved of the pass that counts, at rank 0.
struct Entry {
  Entry(const Communicator& world, const Cell& cell, const std::string& words,
        const std::string& strategy, Index memory)
      : task(task_of(cell, words, strategy, memory)), choice(choose_for(task, world.size(), {})) {
    if (world.rank() != 0) return;
    proof = rehearse(*choice.problem, make_plan(*choice.strategy, *choice.problem, pass()));
    if (proof.fault) throw std::logic_error(proof.fault->text());
  }
  Pass pass() const { return task.wish.gradients ? Pass::backward : Pass::forward; }

  Task task;
  Choice choice;
  Rehearsal proof;
};

template <class E>
void measure(Communicator& world, const Entry& sparse, const Entry& dense, int threads,
             const SparseLimits& limits, SparseRow& row) {
  Contender<E> mine(sparse.task, sparse.choice, world, threads);
  Contender<E> whole(dense.task, dense.choice, world, threads);
  const Pass pass = sparse.pass();
  Runner few{[&] { return mine.run(pass); }};
  Runner all{[&] { return whole.run(pass); }};
  if (world.rank() == 0) {
    few.planned = sparse.proof.bytes_sent_total();
    all.planned = dense.proof.bytes_sent_total();
  }
  // Without messages nobody waits: what a rank takes are its kernels, in whatever turns.
  std::vector<double> kernels;
  const auto kernels_alone = [&] {
    world.barrier();
    const double start = processor_seconds();
    mine.run(pass, {.kernels = true, .messages = false, .polling = false});
    kernels.push_back(processor_seconds() - start);
  };
  alternate(world, few, all, limits, kernels_alone, row);
  // Who shares a core and its caches can only add to it.
  row.kernel_balance = most_over_mean(world, *std::min_element(kernels.begin(), kernels.end()));
  const std::vector<Index>& pairs = sparse.proof.pairs;
  if (world.rank() != 0) return;
  row.area_balance = static_cast<double>(*std::max_element(pairs.begin(), pairs.end())) *
                     world.size() / static_cast<double>(sparse.proof.pairs_total());
}

/// A form of decoding with its cache filled and its queries made.
class Decodes {
 public:
  Decodes(Communicator& world, const Decoding& decoding, const Strategy& form, int threads)
      : lengths_{decoding.capacity.front()},
        decoder_(decoding, form, {}, world,
                 {.score = {.scale = 1 / std::sqrt(static_cast<double>(decoding.d_qk))},
                  .threads = threads}) {
    const Index tokens = lengths_[0];
    Source source = Source::random({tokens, tokens, decoding.query_heads, decoding.key_heads,
                                    decoding.value_heads, decoding.d_qk, decoding.d_v},
                                   1);
    if (decoding.type == Type::bf16) source.round_to_bfloat16();
    const DecodeTensors tensors(decoding, std::move(source));
    if (RaggedCache* ragged = decoder_.ragged()) ragged->advance(0, tokens - 1);
    tensors.append(decoder_, 0, {0, tokens});
    tensors.ask(decoder_, lengths_);
  }
  Decodes(Decodes&&) = delete;

  RunTimes step() { return decoder_.step(lengths_); }
  Index planned() const { return decoder_.rehearsal().bytes_sent_total(); }
  Index cached() {
    const RaggedCache* ragged = decoder_.ragged();
    return ragged != nullptr ? ragged->bytes()
                             : decoder_.cache().bytes(lengths_, decoder_.decoding());
  }

 private:
  std::vector<Index> lengths_;
  Decoder<Communicator> decoder_;
};

void measure_decode(Communicator& world, const Cell& cell, const std::string& form,
                    const SparseLimits& limits, SparseRow& row) {
  Decoding all{.capacity = {cell.tokens}};
  all.query_heads = cell.heads;
  all.key_heads = all.value_heads = cell.kv_heads;
  all.d_qk = cell.d;
  all.d_v = cell.dv;
  all.type = type_of(cell);
  Decoding kept = all;
  Shape shape = cell.shape();
  shape.queries = shape.keys;  // a cache keeps what any token to come may see
  kept.masks = {parse_mask(cell.mask, shape)};
  const Range last{cell.tokens - 1, cell.tokens};
  row.dense = "causal";
  row.density = area_of(shape, *kept.masks.front(), last) /
                area_of(shape, *parse_mask(row.dense, shape), last);
  const Strategy& how = *find_decode_form(form);
  std::optional<Decodes> sparse;
  std::optional<Decodes> dense;
  try {
    sparse.emplace(world, kept, how, cell.threads);
    dense.emplace(world, all, how, cell.threads);
  } catch (const std::invalid_argument& refused) {  // on all ranks, which see the same
    row.refused = refused.what();
    return;
  }
  Runner few{[&] { return sparse->step(); }, sparse->planned()};
  Runner everything{[&] { return dense->step(); }, dense->planned()};
  alternate(
      world, few, everything, limits, [] {}, row);
  row.cached = sum_of(world, sparse->cached());
  row.dense_cached = sum_of(world, dense->cached());
}

}  // namespace

SparseRow measure_on_ranks(Communicator& world, const Cell& cell, const std::string& strategy,
                           const SparseLimits& limits) {
  SparseRow row;
  row.cell = cell;
  row.strategy = strategy;
  row.ranks = world.size();
  row.dense_rows = cell.queries;
  if (cell.decode()) {
    measure_decode(world, cell, strategy, limits, row);
    return row;
  }
  const Shape shape = cell.shape();
  row.dense = dense_mask(shape, cell.mask);
  row.density = area_of(shape, cell.mask) / area_of(shape, row.dense);
  std::optional<Entry> sparse;
  std::optional<Entry> dense;
  try {  // each may have half of what there is
    sparse.emplace(world, cell, cell.mask, strategy, limits.memory / 2);
    dense.emplace(world, cell, row.dense, "ring", limits.memory / 2);
  } catch (const std::invalid_argument& refused) {
    row.refused = refused.what();
  } catch (const Failure& refused) {
    row.refused = refused.what();
  }
  if (!row.refused.empty()) return row;
  row.partition = sparse->choice.problem->partition();
  if (type_of(cell) == Type::bf16) {
    measure<BFloat16>(world, *sparse, *dense, cell.threads, limits, row);
  } else {
    measure<float>(world, *sparse, *dense, cell.threads, limits, row);
  }
  return row;
}

}  // namespace dattn
