#include "kernels/attend.hpp"

#include <omp.h>

#include <cmath>
#include <exception>
#include <limits>

#include "kernels/check.hpp"
#include "kernels/partial.hpp"

namespace dattn {
namespace {

constexpr Index kQ = kTileQueries;
constexpr Index kK = kTileKeys;
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kNone = -std::numeric_limits<float>::infinity();

template <class T>
void check_views(View<const T> q, View<const T> k, View<const T> v, View<T> out, const Where& where,
                 int threads) {
  const Shape& shape = where.shape;
  CHECK(q.rows == size(where.queries) && out.rows == q.rows, q.rows, out.rows);
  CHECK(k.rows == size(where.keys) && v.rows == k.rows, k.rows, v.rows);
  CHECK(q.heads == where.query_heads.size() && out.heads == q.heads, q.heads, out.heads);
  CHECK(k.heads == where.key_heads.size() && v.heads == where.value_heads.size(), k.heads, v.heads);
  CHECK(q.dim == shape.d_qk && k.dim == shape.d_qk && v.dim == shape.d_v, q.dim, k.dim, v.dim);
  CHECK(out.dim == record_length(shape.d_v), out.dim);
  CHECK(where.key_heads.contains(shape.key_heads_of(where.query_heads)), q.heads);
  CHECK(where.value_heads.contains(shape.value_heads_of(where.query_heads)), q.heads);
  CHECK(threads >= 1, threads);
}

/// Cover of a tile whose rows lie in several runs.
Cover cover_of(const Mask& mask, Index head, const Runs& queries, const Runs& keys) {
  bool none = true;
  bool all = true;
  for (const Run& q : queries) {
    for (const Run& k : keys) {
      const Cover one = mask.cover(head, q.bounds(), k.bounds());
      none = none && one == Cover::None;
      all = all && one == Cover::All;
    }
  }
  return none ? Cover::None : all ? Cover::All : Cover::Some;
}

/// What one thread needs to work on a tile of queries of one head.
class TileWorker {
 public:
  explicit TileWorker(const Shape& shape)
      : q_(static_cast<std::size_t>(shape.d_qk * kQ)),
        k_(static_cast<std::size_t>(kK * shape.d_qk)),
        v_(static_cast<std::size_t>(kK * shape.d_v)),
        o_(static_cast<std::size_t>(shape.d_v * kQ)),
        p_(static_cast<std::size_t>(kK * kQ)),
        bias_(static_cast<std::size_t>(kK * kQ)),
        m_(kQ),
        l_(kQ) {}

  /// Starts on the rows [first, first + rows) of one head of q.
  void start(View<const float> q, Index head, Index first, Index rows, double scale) {
    std::fill(q_.begin(), q_.end(), 0.0f);  // lanes without a row compute on zeros
    std::fill(o_.begin(), o_.end(), 0.0f);
    std::fill(m_.begin(), m_.end(), kNone);
    std::fill(l_.begin(), l_.end(), 0.0);
    for (Index row = 0; row < rows; ++row) {
      const float* from = q.at(first + row, head);
      for (Index i = 0; i < q.dim; ++i) {
        q_[static_cast<std::size_t>(i * kQ + row)] =
            static_cast<float>(scale * static_cast<double>(from[i]));
      }
    }
  }

  void step(const Tiles& tiles, View<const float> k, Index key_head, View<const float> v,
            Index value_head, Range keys, bool masked) {
    const bool strange = masked && set_aside(v, value_head, keys);
    tiles.step({.q = q_.data(),
                .k = gathered(k, key_head, keys, k_),
                .v = strange ? v_.data() : gathered(v, value_head, keys, v_),
                .bias = masked ? bias_.data() : nullptr,
                .k_stride = k.dim,
                .v_stride = v.dim,
                .keys = static_cast<int>(keys.size()),
                .d_qk = static_cast<int>(k.dim),
                .d_v = static_cast<int>(v.dim),
                .p = p_.data(),
                .m = m_.data(),
                .l = l_.data(),
                .o = o_.data()});
    if (strange) add_back(v, value_head, keys);
  }

  /// Fills the bias of a tile of which the mask allows some.
  void spell(const Mask& mask, Index head, const Runs& queries, const Runs& keys) {
    std::fill(bias_.begin(), bias_.end(), kNone);
    Index row = 0;
    for (const Run& q : queries) {
      for (Index i = 0; i < q.count; ++i, ++row) {
        Index before = 0;
        for (const Run& k : keys) {
          spans_.clear();
          mask.spans(head, q.at(i), k.bounds(), spans_);
          for (const Range span : spans_) {
            const Range members = k.inside(span);
            for (Index j = members.begin; j < members.end; ++j) {
              bias_[static_cast<std::size_t>((before + j) * kQ + row)] = 0.0f;
            }
          }
          before += k.count;
        }
      }
    }
  }

  /// Merges what was found into the records of these rows.
  void finish(View<float> out, Index head, Index first, Index rows) const {
    const Index d_v = out.dim - 2;
    for (Index row = 0; row < rows; ++row) {
      const auto lane = static_cast<std::size_t>(row);
      if (l_[lane] == 0) continue;  // no key; a row of NaN scores has m = -inf too, but l = NaN
      float* record = out.at(first + row, head);
      const double m = std::max(m_[lane], record[0]);
      const double here = std::exp(static_cast<double>(m_[lane]) - m);
      const double there = record[0] == kNone ? 0.0 : std::exp(static_cast<double>(record[0]) - m);
      record[0] = static_cast<float>(m);
      record[1] = static_cast<float>(l_[lane] * here + static_cast<double>(record[1]) * there);
      for (Index i = 0; i < d_v; ++i) {
        record[2 + i] = static_cast<float>(
            static_cast<double>(o_[static_cast<std::size_t>(i * kQ + row)]) * here +
            static_cast<double>(record[2 + i]) * there);
      }
    }
  }

 private:
  /// One head's rows `keys`, close together: a copy where other heads lie between them. Such rows
  /// fall into the same few cache sets; the copy costs less than that (1.3 times faster at 8 heads
  /// of 128).
  static const float* gathered(View<const float> rows, Index head, Range keys,
                               std::vector<float>& copy) {
    if (rows.row_stride() == rows.dim) return rows.at(keys.begin, head);
    float* to = copy.data();
    for (Index row = keys.begin; row < keys.end; ++row) {
      to = std::copy_n(rows.at(row, head), rows.dim, to);
    }
    return copy.data();
  }

  /// A row that may not see a key weighs its value with 0, which does not keep NaN or infinity out.
  /// If the tile holds such values, v_ becomes the tile with 0 in their places.
  bool set_aside(View<const float> v, Index head, Range keys) {
    bool strange = false;
    for (Index j = keys.begin; j < keys.end; ++j) {
      const float* from = v.at(j, head);
      for (Index i = 0; i < v.dim; ++i) strange |= !(std::abs(from[i]) <= kLargest);
    }
    if (!strange) return false;
    float* to = v_.data();
    for (Index j = keys.begin; j < keys.end; ++j) {
      const float* from = v.at(j, head);
      for (Index i = 0; i < v.dim; ++i) *to++ = std::isfinite(from[i]) ? from[i] : 0.0f;
    }
    return true;
  }

  /// Adds the values set aside, weighed by the step before, to the rows that may see them.
  void add_back(View<const float> v, Index head, Range keys) {
    for (Index j = 0; j < keys.size(); ++j) {
      const float* from = v.at(keys.begin + j, head);
      for (Index i = 0; i < v.dim; ++i) {
        if (std::isfinite(from[i])) continue;
        for (Index row = 0; row < kQ; ++row) {
          const auto at = static_cast<std::size_t>(j * kQ + row);
          if (bias_[at] != kNone) o_[static_cast<std::size_t>(i * kQ + row)] += p_[at] * from[i];
        }
      }
    }
  }

  std::vector<float> q_, k_, v_, o_, p_, bias_, m_;
  std::vector<double> l_;
  std::vector<Range> spans_;
};

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

}  // namespace

void attend(View<const float> q, View<const float> k, View<const float> v, View<float> out,
            const Where& where, const Mask& mask, const Work& work) {
  check_views(q, k, v, out, where, work.threads);
  if (q.size() == 0 || k.rows == 0) return;
  const Shape& shape = where.shape;
  const Tiles& tiles = work.tiles != nullptr ? *work.tiles : chosen_tiles();
  const Index query_tiles = (q.rows + kQ - 1) / kQ;
  std::vector<Runs> key_runs;
  for (Index from = 0; from < k.rows; from += kK) {
    key_runs.push_back(part(where.keys, {from, std::min(from + kK, k.rows)}));
  }
  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    TileWorker worker(shape);
    const bool polls = omp_get_thread_num() == 0 && work.poll;
    // One thread takes a tile of queries through all its keys in order: which thread that is
    // changes no bit of the result. Late tiles of a causal mask are the long ones; take them first.
#pragma omp for schedule(dynamic)
    for (Index unit = 0; unit < query_tiles * q.heads; ++unit) {
      const Index local = unit % q.heads;
      const Index head = where.query_heads.begin + local;
      const Index first = (query_tiles - 1 - unit / q.heads) * kQ;
      const Index rows = std::min(kQ, q.rows - first);
      const Runs query_runs = part(where.queries, {first, first + rows});
      worker.start(q, local, first, rows, work.scale);
      for (std::size_t j = 0; j < key_runs.size(); ++j) {
        const Cover cover = cover_of(mask, head, query_runs, key_runs[j]);
        if (cover == Cover::None) continue;
        if (cover == Cover::Some) worker.spell(mask, head, query_runs, key_runs[j]);
        const Index from = static_cast<Index>(j) * kK;
        worker.step(tiles, k, shape.key_head(head) - where.key_heads.begin, v,
                    shape.value_head(head) - where.value_heads.begin,
                    {from, std::min(from + kK, k.rows)}, cover == Cover::Some);
        if (polls) caught.run(work.poll);
      }
      worker.finish(out, local, first, rows);
    }
  }
  caught.rethrow();
}

void attend(View<const double> q, View<const double> k, View<const double> v, View<double> out,
            const Where& where, const Mask& mask, const Work& work) {
  check_views(q, k, v, out, where, work.threads);
  const Shape& shape = where.shape;
  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    std::vector<double> record(static_cast<std::size_t>(out.dim));
    std::vector<Range> spans;
    std::vector<std::pair<Index, double>> scores;  // key row, score
    const bool polls = omp_get_thread_num() == 0 && work.poll;
#pragma omp for schedule(dynamic)
    for (Index row = 0; row < q.rows; ++row) {
      const Index position = part(where.queries, {row, row + 1}).front().first;
      for (Index local = 0; local < q.heads; ++local) {
        const Index head = where.query_heads.begin + local;
        const double* q_row = q.at(row, local);
        scores.clear();
        double m = -std::numeric_limits<double>::infinity();
        Index before = 0;
        for (const Run& run : where.keys) {
          spans.clear();
          mask.spans(head, position, run.bounds(), spans);
          for (const Range span : spans) {
            const Range members = run.inside(span);
            for (Index j = before + members.begin; j < before + members.end; ++j) {
              const double* k_row = k.at(j, shape.key_head(head) - where.key_heads.begin);
              double dot = 0;
              for (Index i = 0; i < k.dim; ++i) dot += q_row[i] * k_row[i];
              scores.emplace_back(j, work.scale * dot);
              m = std::max(m, work.scale * dot);
            }
          }
          before += run.count;
        }
        if (scores.empty()) continue;
        // Scores of -inf only: every weight is 0, as that of no key.
        const double base = m == -std::numeric_limits<double>::infinity() ? 0.0 : m;
        std::fill(record.begin(), record.end(), 0.0);
        record[0] = m;
        for (const auto& [j, score] : scores) {
          const double p = std::exp(score - base);
          const double* v_row = v.at(j, shape.value_head(head) - where.value_heads.begin);
          record[1] += p;
          for (Index i = 0; i < v.dim; ++i) record[static_cast<std::size_t>(2 + i)] += p * v_row[i];
        }
        merge(record.data(), out.at(row, local), 1, out.dim);
      }
      if (polls) caught.run(work.poll);
    }
  }
  caught.rethrow();
}

}  // namespace dattn
