#include "bench/ideal.hpp"

#include <algorithm>
#include <chrono>

#include "kernels/attend_backward.hpp"
#include "kernels/partial.hpp"
#include "parallel/pairs.hpp"
#include "parallel/stats.hpp"

namespace dattn {
namespace {

Runs all_keys(const Shape& shape) { return {{0, shape.keys, 1}}; }

template <class E>
std::vector<E> zeros(Index count) {
  return std::vector<E>(static_cast<std::size_t>(count));
}

}  // namespace

template <class E>
IdealKeys<E>::IdealKeys(const Task& task) {
  const Shape& s = task.shape;
  k = zeros<E>(s.keys * s.key_heads * s.d_qk);
  v = zeros<E>(s.keys * s.value_heads * s.d_v);
  task.source.read(Kind::K, all_keys(s), k.data());
  task.source.read(Kind::V, all_keys(s), v.data());
  if (!task.wish.gradients) return;
  dk = zeros<E>(std::ssize(k));
  dv = zeros<E>(std::ssize(v));
}

template <class E>
Ideal<E>::Ideal(const Task& task, const Problem& problem, int rank, int threads, IdealKeys<E>& keys)
    : shape_(task.shape),
      mask_(task.mask),
      rows_(problem.queries().rows(rank).size()),
      work_{.score = {.scale = task.scale}, .threads = threads, .workspace = &workspace_},
      keys_(keys) {
  const Range rows = problem.queries().rows(rank);
  const Ranges own = rows.empty() ? Ranges{} : Ranges{rows};
  const Ranges every = shape_.keys == 0 ? Ranges{} : Ranges{{0, shape_.keys}};
  area_ = PairCounter(problem).count({0, shape_.query_heads}, own, every);
  const Runs positions = problem.queries().positions(own);
  where_ = {shape_,    {0, shape_.query_heads}, {0, shape_.key_heads}, {0, shape_.value_heads},
            positions, all_keys(shape_)};
  const Index records = rows_ * shape_.query_heads;
  q_ = zeros<E>(records * shape_.d_qk);
  task.source.read(Kind::Q, positions, q_.data());
  records_ = zeros<E>(records * record_length(shape_.d_v));
  if (!task.wish.gradients) return;
  d_o_ = zeros<E>(records * shape_.d_v);
  task.source.read(Kind::dO, positions, d_o_.data());
  stats_ = zeros<E>(records * 2);
  dq_ = zeros<E>(std::ssize(q_));
  run(Pass::forward);
  auto o = zeros<E>(std::ssize(d_o_));
  auto lse = zeros<E>(records);
  finish<E>(view(records_, record_length(shape_.d_v)), o, lse);
  fill_stats<E>(view(o, shape_.d_v), lse, view(d_o_, shape_.d_v), view(stats_, 2));
}

template <class E>
double Ideal<E>::run(Pass pass) {
  const View<const E> k{keys_.k.data(), shape_.keys, shape_.key_heads, shape_.d_qk};
  const View<const E> v{keys_.v.data(), shape_.keys, shape_.value_heads, shape_.d_v};
  const View<const E> q = view(q_, shape_.d_qk);
  const auto start = [] { return std::chrono::steady_clock::now(); };
  auto from = start();
  if (pass == Pass::forward) {
    const View<E> out = view(records_, record_length(shape_.d_v));
    clear(out);
    from = start();
    attend(q, k, v, out, where_, *mask_, work_);
  } else {
    for (std::vector<E>* sum : {&dq_, &keys_.dk, &keys_.dv}) {
      std::fill(sum->begin(), sum->end(), E{0});
    }
    const View<const E> stats = view(stats_, 2);
    View<const E> delta = stats;
    ++delta.data;
    from = start();
    attend_backward(q, k, v, view(d_o_, shape_.d_v), stats, delta, view(dq_, shape_.d_qk),
                    View<E>{keys_.dk.data(), k.rows, k.heads, k.dim},
                    View<E>{keys_.dv.data(), v.rows, v.heads, v.dim}, where_, *mask_, work_);
  }
  return std::chrono::duration<double>(start() - from).count();
}

Index ideal_keys_bytes(const Task& task) {
  const Shape& s = task.shape;
  const Index once = s.keys * (s.key_heads * s.d_qk + s.value_heads * s.d_v) * bytes_of(task.type);
  return task.wish.gradients ? 2 * once : once;
}

Index ideal_kernel_bytes(const Task& task, Pass pass, Index rows, int threads) {
  const Shape& s = task.shape;
  if (task.type == Type::f8) return 0;
  return pass == Pass::forward
             ? attend_bytes(s, rows, s.query_heads, s.keys, threads, chosen_isa())
             : attend_backward_bytes(s, rows, {0, s.query_heads}, s.keys, s.key_heads,
                                     s.value_heads, threads, chosen_isa());
}

Index ideal_bytes(const Task& task, Index rows, int threads) {
  const Shape& s = task.shape;
  // Q and records; backward dQ, dO, O and Stats too.
  const Index numbers =
      s.d_qk + record_length(s.d_v) + (task.wish.gradients ? s.d_qk + 2 * s.d_v + 3 : 0);
  Index kernel = 0;
  for (const Pass pass : task.passes()) {
    kernel = std::max(kernel, ideal_kernel_bytes(task, pass, rows, threads));
  }
  return rows * s.query_heads * numbers * bytes_of(task.type) + kernel;
}

template struct IdealKeys<float>;
template struct IdealKeys<double>;
template class Ideal<float>;
template class Ideal<double>;

}  // namespace dattn
