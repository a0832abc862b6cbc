// Attention in double, forward and backward, by plain loops: it judges plans and is not meant to be
// fast.
#include <omp.h>

#include <cmath>
#include <limits>

#include "kernels/attend_backward.hpp"
#include "kernels/check.hpp"
#include "kernels/dot.hpp"
#include "kernels/panel.hpp"
#include "kernels/partial.hpp"

namespace dattn {
namespace {

/// A key row that a query row sees.
struct Seen {
  Index key;
  ScoreValue score;
};

/// Appends the keys of the block that row `row` of head `local` sees, with their scores.
void see(View<const double> q, View<const double> k, const Where& where, const Mask& mask,
         const Score& score, Index row, Index local, std::vector<Range>& spans,
         std::vector<Seen>& out) {
  const Index head = where.query_heads.begin + local;
  const Index key_head = where.shape.key_head(head) - where.key_heads.begin;
  const Index position = part(where.queries, {row, row + 1}).front().first;
  const double* q_row = q.at(row, local);
  Index before = 0;
  for (const Run& run : where.keys) {
    spans.clear();
    mask.spans(head, position, run.bounds(), spans);
    for (const Range span : spans) {
      const Range members = run.inside(span);
      for (Index i = members.begin; i < members.end; ++i) {
        const double product = dot(q_row, k.at(before + i, key_head), k.dim);
        const double weight =
            where.key_weights.data == nullptr
                ? 0.0
                : static_cast<double>(*where.key_weights.at(before + i, key_head));
        out.push_back({before + i, score_of(score, head, position, run.at(i), product, weight)});
      }
    }
    before += run.count;
  }
}

}  // namespace

void attend(View<const double> q, View<const double> k, View<const double> v, View<double> out,
            const Where& where, const Mask& mask, const Work& work) {
  check_attend(q, k, v, where, work);
  CHECK(out.rows == q.rows && out.heads == q.heads && out.dim == record_length(where.shape.d_v),
        out.rows, out.heads, out.dim);
  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    std::vector<double> record(static_cast<std::size_t>(out.dim));
    std::vector<Range> spans;
    std::vector<Seen> seen;
    const bool polls = omp_get_thread_num() == 0 && work.poll;
#pragma omp for schedule(dynamic)
    for (Index row = 0; row < q.rows; ++row) {
      for (Index local = 0; local < q.heads; ++local) {
        seen.clear();
        see(q, k, where, mask, work.score, row, local, spans, seen);
        if (seen.empty()) continue;
        double m = work.score.sigmoid ? 0.0 : -std::numeric_limits<double>::infinity();
        if (!work.score.sigmoid) {
          for (const Seen& s : seen) m = std::max(m, s.score.value);
        }
        // Scores of -inf only: every weight is 0, as that of no key.
        const double base = m == -std::numeric_limits<double>::infinity() ? 0.0 : m;
        std::fill(record.begin(), record.end(), 0.0);
        record[0] = m;
        const Index value_head =
            where.shape.value_head(where.query_heads.begin + local) - where.value_heads.begin;
        for (const Seen& s : seen) {
          const double p = work.score.sigmoid ? 1 / (1 + std::exp(-s.score.value))
                                              : std::exp(s.score.value - base);
          const double* v_row = v.at(s.key, value_head);
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

void attend_backward(View<const double> q, View<const double> k, View<const double> v,
                     View<const double> d_o, View<const double> lse, View<const double> delta,
                     View<double> dq, View<double> dk, View<double> dv, const Where& where,
                     const Mask& mask, const Work& work) {
  check_attend_backward(q, k, v, d_o, lse, delta, dq, dk, dv, where, work);
  // Query heads of a group add to one key head, so only whole rows of heads could run side by side;
  // one thread is enough for what judges.
  std::vector<Range> spans;
  std::vector<Seen> seen;
  for (Index local = 0; local < q.heads; ++local) {
    const Index head = where.query_heads.begin + local;
    const Index key_head = where.shape.key_head(head) - where.key_heads.begin;
    const Index value_head = where.shape.value_head(head) - where.value_heads.begin;
    for (Index row = 0; row < q.rows; ++row) {
      seen.clear();
      see(q, k, where, mask, work.score, row, local, spans, seen);
      const double* g = d_o.at(row, local);
      for (const Seen& s : seen) {
        const double* v_row = v.at(s.key, value_head);
        double dp = 0;
        for (Index i = 0; i < v.dim; ++i) dp += g[i] * v_row[i];
        double p = 0;
        double ds = 0;
        if (work.score.sigmoid) {
          p = 1 / (1 + std::exp(-s.score.value));
          ds = p * (1 - p) * dp;
        } else if (*lse.at(row, local) != -std::numeric_limits<double>::infinity()) {
          p = std::exp(s.score.value - *lse.at(row, local));
          ds = p * (dp - *delta.at(row, local));
        }
        ds *= s.score.slope * work.score.scale;
        for (Index i = 0; i < v.dim; ++i) dv.at(s.key, value_head)[i] += p * g[i];
        for (Index i = 0; i < q.dim; ++i) {
          dq.at(row, local)[i] += ds * k.at(s.key, key_head)[i];
          dk.at(s.key, key_head)[i] += ds * q.at(row, local)[i];
        }
      }
    }
    if (work.poll) work.poll();
  }
}

}  // namespace dattn
