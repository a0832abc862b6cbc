#pragma once

// What forward, backward and decode share: the folder's own, not for others to include.

#include <chrono>
#include <cstddef>
#include <exception>

#include "kernels/attend.hpp"
#include "kernels/check.hpp"
#include "kernels/live.hpp"

namespace dattn {

/// Keeps the first exception of a parallel region: none may leave it.
class Caught {
 public:
  template <class F>
  void run(const F& f) noexcept {
    if (failed_) return;
    try {
      f();
    } catch (...) {
      error_ = std::current_exception();
      failed_ = true;
    }
  }
  void rethrow() const {
    if (failed_) std::rethrow_exception(error_);
  }

 private:
  bool failed_ = false;  // only the polling thread touches these
  std::exception_ptr error_;
};

/// Calls a poll from one thread, not more often than pays: after so many operations or so much
/// time.
class Poller {
 public:
  Poller(const std::function<void()>& poll, Caught& caught, bool here)
      : poll_(here && poll ? &poll : nullptr), caught_(caught) {}

  void after(double flops) {
    if (poll_ == nullptr) return;
    flops_ += flops;
    if (flops_ < 4e6 && Clock::now() - last_ < std::chrono::microseconds(100)) return;
    caught_.run(*poll_);
    flops_ = 0;
    last_ = Clock::now();
  }

 private:
  using Clock = std::chrono::steady_clock;
  const std::function<void()>* poll_;
  Caught& caught_;
  double flops_ = 0;
  Clock::time_point last_ = Clock::now();
};

/// A size in bytes, rounded up so that what follows is aligned too.
inline Index aligned(Index bytes) { return (bytes + 63) / 64 * 64; }

/// The workspace of a call: the caller's, or one that ends with the call.
class CallWorkspace {
 public:
  explicit CallWorkspace(const Work& work) : used_(work.workspace) {}
  template <class T>
  T* take(Workspace::Use use, Index count) {
    return (used_ != nullptr ? *used_ : own_).template take<T>(use, count);
  }

 private:
  Workspace* used_;
  Workspace own_;
};

template <class T>
constexpr Element element_of() {
  return sizeof(T) == 2 ? Element::bf16 : Element::f4;
}

template <class T>
const Kernel& kernel_of(const Work& work) {
  const Isa& isa = work.isa != nullptr ? *work.isa : chosen_isa();
  return sizeof(T) == 2 ? *isa.bf16 : *isa.f4;
}

/// The thread is prepared for kernels while this lives.
class Entered {
 public:
  explicit Entered(const Kernel& kernel) : kernel_(kernel), before_(kernel.enter()) {}
  ~Entered() { kernel_.leave(before_); }
  Entered(const Entered&) = delete;

 private:
  const Kernel& kernel_;
  long before_;
};

/// The rows `rows` of one head.
template <class T>
Rows rows_of(View<const T> view, Index head, Range rows) {
  return {view.at(rows.begin, head), view.row_stride(), static_cast<int>(rows.size()),
          static_cast<int>(view.dim), element_of<T>()};
}

/// Asks for rows that are read or written soon: they lie apart, where no hardware looks ahead.
template <class T>
void prefetch(const T* row, Index numbers) {
  constexpr Index kLine = 64;
  const auto* at = reinterpret_cast<const char*>(row);
  const Index bytes = numbers * static_cast<Index>(sizeof(T));
  for (Index i = 0; i < bytes; i += kLine) __builtin_prefetch(at + i, 0, 2);
}
template <class T>
void prefetch(View<const T> view, Index head, Range rows) {
  for (Index row = rows.begin; row < rows.end; ++row) prefetch(view.at(row, head), view.dim);
}

/// The score rules of a block in a kernel's unit.
class BlockRules {
 public:
  BlockRules(const Score& score, const Where& where, const Kernel& kernel);

  /// What enters a pack of Q.
  float factor() const { return factor_; }
  Normalizer normalizer() const {
    return score_.sigmoid ? Normalizer::sigmoid : Normalizer::softmax;
  }

 private:
  friend class PanelRules;
  const Score& score_;
  const Where& where_;
  double unit_;  ///< a score of 1 in the kernel's unit
  float factor_;
  std::vector<float> bias_;  ///< as score.bias
};

/// The rules of the lanes of a panel and of the keys of a tile.
class PanelRules {
 public:
  PanelRules(const BlockRules& block, int lanes, int tile);

  /// Lane i is query head `head_of_lane[i]` (counted from the block's first) of row
  /// `row_of_lane[i]`, negative: nothing.
  void lanes(std::span<const Index> row_of_lane, std::span<const Index> head_of_lane);
  /// The key rows `tile` of key head `key_head` (counted from the block's first).
  void keys(Range tile, Index key_head);

  ScoreRules rules() const;

 private:
  const BlockRules& block_;
  Index base_ = 0;  ///< position from which the others are counted
  std::vector<float> slope_, weight_;
  std::vector<const float*> bias_;
  std::vector<int> query_, key_;
};

/// How the sums of a record and of a lane's state add up.
struct MergeWeights {
  float keep;  ///< of what the record held
  float add;   ///< of what the lane found; 0: leave the record alone
};

/// Merges the maximum (in natural units) and the sum of a lane's state into a record
/// (kernels/partial.hpp) of d_v more numbers, which are to be merged with the weights that it
/// returns; they are zeros then, where the record was over no key.
MergeWeights merge_head(double m, double l, float* record, Index d_v);

/// The preconditions that attend and attend_backward share.
template <class T>
void check_attend(View<const T> q, View<const T> k, View<const T> v, const Where& where,
                  const Work& work);

template <class T, class G>
void check_attend_backward(View<const T> q, View<const T> k, View<const T> v, View<const T> d_o,
                           View<const G> lse, View<const G> delta, View<G> dq, View<G> dk,
                           View<G> dv, const Where& where, const Work& work) {
  check_attend(q, k, v, where, work);
  const auto same = [](auto a, auto b) { return a.rows == b.rows && a.heads == b.heads; };
  CHECK(same(d_o, q) && d_o.dim == v.dim, d_o.rows, d_o.heads, d_o.dim);
  CHECK(same(dq, q) && dq.dim == q.dim, dq.rows, dq.heads, dq.dim);
  CHECK(same(dk, k) && dk.dim == k.dim, dk.rows, dk.heads, dk.dim);
  CHECK(same(dv, v) && dv.dim == v.dim, dv.rows, dv.heads, dv.dim);
  if (work.score.sigmoid) return;
  CHECK(same(lse, q) && lse.dim >= 1 && same(delta, q) && delta.dim >= 1, lse.rows, delta.rows);
}

}  // namespace dattn
