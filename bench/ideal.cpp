#include "bench/ideal.hpp"

#include <algorithm>
#include <chrono>

#include "kernels/area.hpp"
#include "kernels/attend_backward.hpp"
#include "kernels/partial.hpp"
#include "launcher/memory.hpp"
#include "parallel/pairs.hpp"
#include "parallel/stats.hpp"

namespace dattn {
namespace {

/// The keys that the rows of `rank` see with any head, as ascending Ranges.
Ranges keys_of(const Problem& problem, int rank) {
  std::vector<Range> all;
  for (std::size_t group = 0; group < problem.head_groups().size(); ++group) {
    const Ranges& seen = problem.keys_needed(rank, group);
    all.insert(all.end(), seen.begin(), seen.end());
  }
  return union_of(std::move(all));
}

Runs runs_of(const Ranges& ranges) {
  Runs runs;
  for (const Range range : ranges) runs.push_back({range.begin, range.size(), 1});
  return runs;
}

template <class E>
std::vector<E> zeros(Index count) {
  return std::vector<E>(static_cast<std::size_t>(count));
}

/// `rows` rows from row `first` on.
template <class E>
View<E> rows_of(std::vector<E>& numbers, Index first, Index rows, Index heads, Index dim) {
  if (numbers.empty()) return {};
  return {numbers.data() + first * heads * dim, rows, heads, dim};
}

}  // namespace

template <class E>
IdealKeys<E>::IdealKeys(const Task& task, const Runs& positions, int threads) {
  const Shape& s = task.shape;
  k = zeros<E>(size(positions) * s.key_heads * s.d_qk);
  v = zeros<E>(size(positions) * s.value_heads * s.d_v);
  task.source.read(Kind::K, positions, k.data(), threads);
  task.source.read(Kind::V, positions, v.data(), threads);
  if (!task.wish.gradients) return;
  dk = zeros<SumOf<E>>(std::ssize(k));
  dv = zeros<SumOf<E>>(std::ssize(v));
}

template <class E>
Ideal<E>::Ideal(const Task& task, const Problem& problem, int rank, int threads, IdealKeys<E>& all)
    : shape_(task.shape),
      mask_(task.mask),
      rows_(problem.queries().rows(rank).size()),
      work_{.score = task.scoring.score, .threads = threads, .workspace = &workspace_} {
  const Range rows = problem.queries().rows(rank);
  const Ranges own = rows.empty() ? Ranges{} : Ranges{rows};
  const Ranges every = shape_.keys == 0 ? Ranges{} : Ranges{{0, shape_.keys}};
  area_ = PairCounter(problem).count(Ranges{{0, shape_.query_heads}}, own, every);
  const Ranges seen = keys_of(problem, rank);
  if (seen.size() > 1) own_.emplace(task, runs_of(seen), threads);
  IdealKeys<E>& keys = own_ ? *own_ : all;
  const Index first = own_ || seen.empty() ? 0 : seen.front().begin;
  k_ = rows_of(keys.k, first, size(seen), shape_.key_heads, shape_.d_qk);
  v_ = rows_of(keys.v, first, size(seen), shape_.value_heads, shape_.d_v);
  dk_ = rows_of(keys.dk, first, size(seen), shape_.key_heads, shape_.d_qk);
  dv_ = rows_of(keys.dv, first, size(seen), shape_.value_heads, shape_.d_v);
  const Runs positions = problem.queries().positions(own);
  where_ = {shape_,
            {0, shape_.query_heads},
            {0, shape_.key_heads},
            {0, shape_.value_heads},
            positions,
            runs_of(seen)};
  const Index records = rows_ * shape_.query_heads;
  q_ = zeros<E>(records * shape_.d_qk);
  task.source.read(Kind::Q, positions, q_.data(), threads);
  records_ = zeros<SumOf<E>>(records * record_length(shape_.d_v));
  if (!task.wish.gradients) return;
  d_o_ = zeros<E>(records * shape_.d_v);
  task.source.read(Kind::dO, positions, d_o_.data(), threads);
  stats_ = zeros<SumOf<E>>(records * 2);
  dq_ = zeros<SumOf<E>>(std::ssize(q_));
  run(Pass::forward);
  auto o = zeros<SumOf<E>>(std::ssize(d_o_));
  auto lse = zeros<SumOf<E>>(records);
  finish<SumOf<E>>(view(records_, record_length(shape_.d_v)), o, lse, threads);
  fill_stats<E>(view(o, shape_.d_v), lse, view(d_o_, shape_.d_v), view(stats_, 2), threads);
}

template <class E>
double Ideal<E>::run(Pass pass) {
  using Sum = SumOf<E>;
  const View<const E> q = view(q_, shape_.d_qk);
  const auto start = [] { return std::chrono::steady_clock::now(); };
  auto from = start();
  if (pass == Pass::forward) {
    const View<Sum> out = view(records_, record_length(shape_.d_v));
    clear(out, work_.threads);
    from = start();
    attend(q, k_, v_, out, where_, *mask_, work_);
  } else {
    const View<Sum> dq = view(dq_, shape_.d_qk);
    for (const View<Sum>& sum : {dq, dk_, dv_}) std::fill_n(sum.data, sum.size(), Sum{0});
    const View<const Sum> stats = view(stats_, 2);
    View<const Sum> delta = stats;
    ++delta.data;
    from = start();
    attend_backward(q, k_, v_, view(d_o_, shape_.d_v), stats, delta, dq, dk_, dv_, where_, *mask_,
                    work_);
  }
  return std::chrono::duration<double>(start() - from).count();
}

Runs all_keys(const Task& task) { return {{0, task.shape.keys, 1}}; }

Index ideal_keys_bytes(const Task& task, Index keys) {
  const Shape& s = task.shape;
  const Index once = keys * (s.key_heads * s.d_qk + s.value_heads * s.d_v);
  return once * (bytes_of(task.type) + (task.wish.gradients ? sum_bytes_of(task.type) : 0));
}

Index ideal_bytes(const Task& task, const Problem& problem, int rank, int threads) {
  const Shape& s = task.shape;
  const Index rows = problem.queries().rows(rank).size();
  const Ranges seen = keys_of(problem, rank);
  // Q and records; backward dQ, dO, O and Stats too.
  const Index numbers =
      s.d_qk + record_length(s.d_v) + (task.wish.gradients ? s.d_qk + 2 * s.d_v + 3 : 0);
  Index most = 0;  // that a kernel takes
  if (task.type != Type::f8) {
    const Kernel& kernel = chosen_kernel(task.type);
    most = attend_bytes(s, rows, s.query_heads, size(seen), threads, kernel);
    if (task.wish.gradients) {
      most = std::max(most, attend_backward_bytes(s, rows, {0, s.query_heads}, size(seen),
                                                  s.key_heads, threads, kernel));
    }
  }
  return rows * s.query_heads * numbers * sum_bytes_of(task.type) + most +
         (seen.size() > 1 ? ideal_keys_bytes(task, size(seen)) : 0);
}

template struct IdealKeys<BFloat16>;
template struct IdealKeys<float>;
template struct IdealKeys<double>;
template class Ideal<BFloat16>;
template class Ideal<float>;
template class Ideal<double>;

}  // namespace dattn
