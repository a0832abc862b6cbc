#include "launcher/kernel_rates.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <vector>

#include "kernels/area.hpp"
#include "kernels/attend_backward.hpp"
#include "kernels/partial.hpp"

namespace dattn {
namespace {

/// A block like those that one of `ranks` ranks computes, cut to about `flops` a thread, and the
/// query heads of it to compute: those of a key head, or one for each thread.
Shape block_like(const Shape& like, int ranks, int threads, double flops_per_pair, double flops,
                 Range& heads) {
  Shape shape = like;
  // The rows of K and V are as far apart as they will be. Nobody knows yet whether a problem of
  // this size fits into memory, so huge extents are cut; the rate does not differ.
  constexpr Index kWidest = 1024;
  constexpr Index kMostHeads = 64;
  constexpr Index kMostNumbers = Index{1} << 24;  // of K
  shape.d_qk = std::min(like.d_qk, kWidest);
  shape.d_v = std::min(like.d_v, kWidest);
  if (like.query_heads > kMostHeads) shape.query_heads = shape.key_heads = shape.value_heads = 1;
  const Index group = shape.query_heads / std::min(shape.key_heads, shape.value_heads);
  heads = {0, std::min<Index>(shape.query_heads, std::max<Index>(threads, group))};
  const double pairs = flops * threads / flops_per_pair / static_cast<double>(heads.size());
  const auto rows = [&](Index all) { return std::max<Index>(1, (all + ranks - 1) / ranks); };
  const auto side = std::max<Index>(1, static_cast<Index>(std::sqrt(pairs)));
  shape.queries = std::min(rows(like.queries), side);
  const auto keys = static_cast<Index>(pairs / static_cast<double>(shape.queries));
  const Index widest = std::max(shape.key_heads * shape.d_qk, shape.value_heads * shape.d_v);
  shape.keys = std::clamp<Index>(keys, 1, std::min(rows(like.keys), kMostNumbers / widest));
  shape.queries = std::min(shape.queries, shape.keys);
  return shape;
}

/// Whose kernels, by which clock, with which scores.
struct How {
  const Isa* isa = nullptr;  ///< null: the one in use
  Seconds now = wall_seconds;
  Score score = {};
};

/// The rules of the scores, of as many heads as a block has: what they take of time depends on no
/// number in them.
Score of_heads(Score score, Index heads) {
  if (!score.alibi.empty()) score.alibi.resize(static_cast<std::size_t>(heads), score.alibi[0]);
  if (!score.bias.empty()) {
    score.bias.resize(static_cast<std::size_t>(heads * (2 * score.reach + 1)));
  }
  return score;
}

/// How fast a kernel is seen to be.
struct Rate {
  double flops = 0;    ///< a second
  double seconds = 0;  ///< of one call
  double work = 0;     ///< floating-point operations of one call
};

/// The kernel of a pass on the query heads `heads` of a block, all of whose pairs count.
template <class T>
Rate rate_of(const Shape& shape, Range heads, Pass pass, int threads, const How& how,
             const char* words = "full") {
  using Sum = SumOf<T>;
  const auto sized = [](Index n) { return std::vector<T>(static_cast<std::size_t>(n), T{0.01F}); };
  const auto sums = [](Index n) { return std::vector<Sum>(static_cast<std::size_t>(n)); };
  const auto q = sized(shape.queries * heads.size() * shape.d_qk);
  const auto k = sized(shape.keys * shape.key_heads * shape.d_qk);
  const auto v = sized(shape.keys * shape.value_heads * shape.d_v);
  const View<const T> queries{q.data(), shape.queries, heads.size(), shape.d_qk};
  const View<const T> keys{k.data(), shape.keys, shape.key_heads, shape.d_qk};
  const View<const T> values{v.data(), shape.keys, shape.value_heads, shape.d_v};
  auto out = sums(shape.queries * heads.size() * record_length(shape.d_v));
  const View<Sum> result{out.data(), shape.queries, heads.size(), record_length(shape.d_v)};
  clear(result);
  const MaskPtr mask = parse_mask(words, shape);
  const Where where{shape,
                    heads,
                    {0, shape.key_heads},
                    {0, shape.value_heads},
                    {{0, shape.queries, 1}},
                    {{0, shape.keys, 1}}};
  Workspace workspace;
  const Work work{.score = of_heads(how.score, shape.query_heads),
                  .threads = threads,
                  .isa = how.isa,
                  .workspace = &workspace};
  // LSE is about ln(keys) for equal scores; delta and dO may be anything.
  const bool backward = pass == Pass::backward;
  const auto d_o = sized(backward ? shape.queries * heads.size() * shape.d_v : 0);
  const std::vector<Sum> stats(
      backward ? static_cast<std::size_t>(shape.queries * heads.size()) : 0,
      static_cast<Sum>(std::log(static_cast<double>(shape.keys))));
  auto dq = sums(backward ? std::ssize(q) : 0);
  auto dk = sums(backward ? std::ssize(k) : 0);
  auto dv = sums(backward ? std::ssize(v) : 0);
  const auto once = [&] {
    if (!backward) return attend(queries, keys, values, result, where, *mask, work);
    const View<const Sum> known{stats.data(), shape.queries, heads.size(), 1};
    attend_backward(
        queries, keys, values, View<const T>{d_o.data(), shape.queries, heads.size(), shape.d_v},
        known, known, View<Sum>{dq.data(), queries.rows, queries.heads, queries.dim},
        View<Sum>{dk.data(), keys.rows, keys.heads, keys.dim},
        View<Sum>{dv.data(), values.rows, values.heads, values.dim}, where, *mask, work);
  };
  once();  // threads start, pages are touched
  constexpr double kAtLeast = 0.02;
  constexpr std::size_t kRuns = 3;
  std::vector<double> seconds;
  const double begin = how.now();
  while (seconds.size() < kRuns || how.now() - begin < kAtLeast) {
    const double start = how.now();
    once();
    seconds.push_back(how.now() - start);
  }
  const auto middle = seconds.begin() + std::ssize(seconds) / 2;
  std::nth_element(seconds.begin(), middle, seconds.end());
  const Shape& s = shape;
  const double flops = static_cast<double>(s.queries * s.keys * heads.size()) *
                       (backward ? s.backward_flops_per_pair() : s.flops_per_pair());
  return {flops / *middle, *middle, flops};
}

/// The same on a block like those to come, see block_like().
template <class T>
Rate rate_of_block(const Shape& like, int ranks, Pass pass, int threads, double flops,
                   const How& how) {
  const double flops_per_pair =
      pass == Pass::forward ? like.flops_per_pair() : like.backward_flops_per_pair();
  Range heads;
  const Shape shape = block_like(like, ranks, threads, flops_per_pair, flops, heads);
  return rate_of<T>(shape, heads, pass, threads, how);
}

/// Bytes a second of rows in a call of which `of_pairs` seconds are not theirs; 0 if that is nearly
/// all.
double beyond(double seconds, double of_pairs, Index bytes) {
  const double of_rows = seconds - of_pairs;
  return of_rows < 0.05 * seconds ? 0 : static_cast<double>(bytes) / of_rows;
}

/// Of query rows and their records, from a block of many of them that see few keys.
/// @pre `rate` is that of large blocks, forward
template <class T>
double query_row_rate(const Shape& like, int ranks, int threads, double rate, const How& how) {
  constexpr Index kRecords = Index{32} << 20;  // bytes, a thread
  constexpr Index kKeys = 64;
  Range heads;
  Shape shape = block_like(like, ranks, threads, like.flops_per_pair(), 2e9, heads);
  const Index record = record_length(shape.d_v) * static_cast<Index>(sizeof(SumOf<T>));
  shape.keys = kKeys;
  const Index rows = (like.queries + ranks - 1) / ranks;  // no more than there are
  shape.queries =
      std::clamp<Index>(kRecords * threads / (record * heads.size()), 1, std::max<Index>(1, rows));
  const Rate seen = rate_of<T>(shape, heads, Pass::forward, threads, how);
  const Index row = shape.d_qk * static_cast<Index>(sizeof(T)) + 2 * record;
  return beyond(seen.seconds, seen.work / rate, shape.queries * heads.size() * row);
}

/// Of key rows, from a block of one head where each row sees the few keys before it: what is left
/// of its time beside the pairs that are computed and the query rows. So all that goes with keys of
/// which few rows see each is in it. One thread.
template <class T>
double key_row_rate(const Shape& like, int ranks, double rate, double rows, const How& how) {
  constexpr Index kRows = 2048;
  constexpr Index kGroups = 16;
  constexpr const char* kMask = "window:63,0";
  const Index own = (std::min(like.queries, like.keys) + ranks - 1) / ranks;
  Range heads;
  Shape shape = block_like(like, ranks, 1, like.flops_per_pair(), 2e9, heads);
  shape.queries = shape.keys = std::clamp<Index>(own, 1, kRows);
  const Runs all{{0, shape.keys, 1}};
  const MaskPtr mask = parse_mask(kMask, shape);
  const Type type = sizeof(T) == 2 ? Type::bf16 : Type::f4;
  const Extra extra = extra_pairs(*mask, 0, all, all, grain_of(type, how.isa), 1, kGroups);
  const double pairs =
      static_cast<double>(area(*mask, 0, all, all)) + extra.beside + kMaskedForward * extra.masked;
  double known = pairs * shape.flops_per_pair() / rate;
  const auto item = static_cast<Index>(sizeof(T));
  const Index record = record_length(shape.d_v) * static_cast<Index>(sizeof(SumOf<T>));
  if (rows > 0) {
    known += static_cast<double>(shape.queries * (shape.d_qk * item + 2 * record)) / rows;
  }
  const Rate seen = rate_of<T>(shape, {0, 1}, Pass::forward, 1, how, kMask);
  return beyond(seen.seconds, known, shape.keys * (shape.d_qk + shape.d_v) * item);
}

/// FLOP/s of a thread's share of a pass. A block that takes less than kEnough says too little of
/// larger ones, if there are larger ones: kernels do work for each row, too, and a core has slow
/// moments.
template <class T>
double rate_of_pass(const Shape& like, int ranks, Pass pass, int threads, const How& how) {
  constexpr double kEnough = 0.03;
  const double flops = sizeof(T) < 8 ? 2e9 : 1e6;
  const Rate rate = rate_of_block<T>(like, ranks, pass, threads, flops, how);
  if (rate.seconds >= kEnough || rate.work < 0.9 * flops * threads) return rate.flops;
  return rate_of_block<T>(like, ranks, pass, threads, rate.flops / threads * kEnough, how).flops;
}

/// FLOP/s from a block that takes some tens of milliseconds, whatever the instruction set.
template <class T>
double quick_rate_of(const Shape& like, int ranks, Pass pass, int threads, const Isa* isa) {
  constexpr double kFew = 1e6;
  constexpr double kSeconds = 0.02;
  const double few = rate_of_block<T>(like, ranks, pass, threads, kFew, {isa}).flops;
  return rate_of_block<T>(like, ranks, pass, threads, few / threads * kSeconds, {isa}).flops;
}

/// FLOP/s of one query of all heads against keys beyond the caches of a core.
template <class T>
double decode_rate_of(const Shape& like, int ranks, int threads) {
  constexpr Index kBytes = Index{64} << 20;  // of K and V, a thread
  const Index row =
      (like.key_heads * like.d_qk + like.value_heads * like.d_v) * static_cast<Index>(sizeof(T));
  Shape shape = like;
  shape.queries = 1;
  shape.keys = std::clamp<Index>(kBytes * threads / row, 1, std::max<Index>(1, like.keys / ranks));
  return rate_of<T>(shape, {0, shape.query_heads}, Pass::forward, threads, {}).flops;
}

template <class Of>
auto by_type(Type type, const Of& of) {
  return type == Type::bf16 ? of(BFloat16{}) : type == Type::f4 ? of(float{}) : of(double{});
}

}  // namespace

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double processor_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double kernel_rate(const Shape& like, int ranks, Type type, Pass pass, int threads, Seconds now,
                   const Score& score) {
  return by_type(type, [&]<class T>(T) {
    return rate_of_pass<T>(like, ranks, pass, threads, {nullptr, now, score});
  });
}

double decode_rate(const Shape& like, int ranks, Type type, int threads) {
  return by_type(type, [&]<class T>(T) { return decode_rate_of<T>(like, ranks, threads); });
}

double quick_rate(const Shape& like, int ranks, Type type, Pass pass, int threads, const Isa* isa) {
  return by_type(type,
                 [&]<class T>(T) { return quick_rate_of<T>(like, ranks, pass, threads, isa); });
}

RowRates row_rates(const Shape& like, int ranks, Type type, int threads, double rate,
                   const Isa* isa, Seconds now, const Score& score) {
  if (type == Type::f8) return {};
  const How how{isa, now, score};
  return by_type(type, [&]<class T>(T) {
    RowRates rates;
    rates.rows = query_row_rate<T>(like, ranks, threads, rate, how);
    // What one thread does, as often.
    const double of_one = threads;
    rates.packs = of_one * key_row_rate<T>(like, ranks, rate / of_one, rates.rows / of_one, how);
    return rates;
  });
}

Grain grain_of(Type type, const Isa* isa) {
  if (type == Type::f8) return {};
  const Isa& in_use = isa != nullptr ? *isa : chosen_isa();
  const Kernel& kernel = type == Type::bf16 ? *in_use.bf16 : *in_use.f4;
  return {kernel.lanes, kernel.granule};
}

}  // namespace dattn
