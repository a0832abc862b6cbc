#include "kernels/decode.hpp"

#include <omp.h>

#include <algorithm>
#include <limits>

#include "kernels/check.hpp"
#include "kernels/in_parts.hpp"
#include "kernels/panel.hpp"
#include "kernels/partial.hpp"

namespace dattn {
namespace {

/// Keys of one call of the kernel; masks are looked at once for each.
constexpr Index kBlock = 512;
constexpr int kGranule = 32;
/// Parts of the keys, at most, and keys of a part, at least; not by threads, so that bits do not
/// depend on them.
constexpr Index kParts = 64;
constexpr Index kLeast = 256;

/// The lanes of a group that go through the keys together, and what they found.
struct Batch {
  Batch(const HeadGroup& group_in, Range lanes_in, const BlockRules& block_rules, Index d_v)
      : group(&group_in),
        lanes(lanes_in),
        masks(static_cast<int>(lanes.size()), static_cast<int>(kBlock)),
        rules(block_rules, static_cast<int>(lanes.size()), static_cast<int>(kBlock)),
        m(static_cast<std::size_t>(lanes.size())),
        l(m.size()),
        o(static_cast<std::size_t>(lanes.size() * d_v)) {
    for (Index lane = lanes.begin; lane < lanes.end; ++lane) {
      row_of.push_back(group->row(lane));
      head_of.push_back(group->head(lane));
    }
    rules.lanes(row_of, head_of);
  }

  /// Nothing found yet.
  void start() {
    std::fill(m.begin(), m.end(), -std::numeric_limits<float>::infinity());
    std::fill(l.begin(), l.end(), 0.0);
    std::fill(o.begin(), o.end(), 0.0f);
  }

  const HeadGroup* group;
  Range lanes;
  std::vector<Index> row_of, head_of;
  LaneMasks masks;
  PanelRules rules;
  std::vector<Piece> pieces;
  std::vector<float> m;
  std::vector<double> l;
  std::vector<float> o;
};

template <class T>
void decode_block(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                  const Where& where, const Mask& mask, const Work& work,
                  const std::vector<HeadGroup>& groups) {
  const Kernel& kernel = kernel_of<T>(work);
  const Index step_lanes = kernel.decode_lanes;
  const BlockRules rules(work.score, where, kernel);
  std::vector<LiveRows> live;
  for (const HeadGroup& group : groups) {
    CHECK(q.rows * group.heads.size() <= kDecodeLanes, q.rows, group.heads.size());
    live.emplace_back(where, mask, where.query_heads.begin + group.heads.begin, Range{0, q.rows});
  }
  // Queries with the scale, dense by group: lanes are rows of Q in the order row, head.
  std::vector<float> scaled(static_cast<std::size_t>(q.size()));
  std::vector<const float*> q_of_group;
  float* to = scaled.data();
  for (const HeadGroup& group : groups) {
    q_of_group.push_back(to);
    for (Index row = 0; row < q.rows; ++row) {
      for (Index h = group.heads.begin; h < group.heads.end; ++h) {
        for (Index i = 0; i < q.dim; ++i) {
          *to++ = rules.factor() * static_cast<float>(q.at(row, h)[i]);
        }
      }
    }
  }

  // Of a batch's cache a sequence sees its own keys: what nobody sees has no part.
  const Ranges seen_keys = keys_seen(live);
  if (seen_keys.empty()) return;
  const Index parts = std::clamp<Index>(size(seen_keys) / kLeast, 1, kParts);
  const std::vector<Range> keys_of_part = even_cuts(seen_keys, parts);
  const Index records = q.rows * q.heads;
  CallWorkspace workspace(work);
  auto* found = workspace.take<float>(Workspace::Use::partials, parts * records * out.dim);
  const auto part_view = [&](Index part) {
    return View<float>{found + part * records * out.dim, q.rows, q.heads, out.dim};
  };
  start(View<float>{found, parts * q.rows, q.heads, out.dim}, work.threads);

  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    const Entered entered(kernel);
    Poller poller(work.poll, caught, omp_get_thread_num() == 0);
    std::vector<DecodeStep> steps;
    std::vector<Batch> batches;
    for (const HeadGroup& group : groups) {
      const Index lanes = q.rows * group.heads.size();
      for (Index first = 0; first < lanes; first += step_lanes) {
        batches.emplace_back(group, Range{first, std::min(first + step_lanes, lanes)}, rules,
                             v.dim);
      }
    }
#pragma omp for schedule(dynamic)
    for (Index part = 0; part < parts; ++part) {
      for (Batch& batch : batches) batch.start();
      const Range mine = keys_of_part[static_cast<std::size_t>(part)];
      const Index coming = work.threads == 1 ? k.rows : mine.end;  // what this thread reads next
      for (Index from = mine.begin; from < mine.end; from += kBlock) {
        const Range keys{from, std::min(from + kBlock, mine.end)};
        steps.clear();
        for (Batch& batch : batches) {
          const auto g = static_cast<std::size_t>(batch.group - groups.data());
          live[g].pieces({batch.row_of.front(), batch.row_of.back() + 1}, keys, kGranule,
                         batch.pieces);
          if (batch.pieces.empty()) continue;
          const bool masked = std::any_of(batch.pieces.begin(), batch.pieces.end(),
                                          [](const Piece& x) { return x.masked; });
          const Lanes seen = masked ? batch.masks.spell(live[g], batch.row_of, keys) : Lanes{};
          batch.rules.keys(keys, batch.group->key_head);
          steps.push_back({.q = q_of_group[g] + batch.lanes.begin * q.dim,
                           .lanes = static_cast<int>(batch.lanes.size()),
                           .k = rows_of(k, batch.group->key_head, keys),
                           .v = rows_of(v, batch.group->value_head, keys),
                           .following = static_cast<int>(std::min(coming - keys.end, kBlock)),
                           .pieces = batch.pieces.data(),
                           .piece_count = static_cast<int>(batch.pieces.size()),
                           .begin = seen.begin,
                           .end = seen.end,
                           .bits = seen.bits,
                           .rules = batch.rules.rules(),
                           .normalizer = rules.normalizer(),
                           .m = batch.m.data(),
                           .l = batch.l.data(),
                           .o = batch.o.data()});
        }
        if (!steps.empty()) kernel.decode(steps.data(), static_cast<int>(steps.size()));
        poller.after(static_cast<double>(keys.size() * records * 2 * (k.dim + v.dim)));
      }
      for (const Batch& batch : batches) {
        for (std::size_t i = 0; i < batch.m.size(); ++i) {
          float* record = part_view(part).at(batch.row_of[i], batch.head_of[i]);
          const MergeWeights w = merge_head(kernel.nats * batch.m[i], batch.l[i], record, v.dim);
          if (w.add == 0) continue;
          const float* o = batch.o.data() + static_cast<Index>(i) * v.dim;
          for (Index x = 0; x < v.dim; ++x) record[2 + x] = record[2 + x] * w.keep + o[x] * w.add;
        }
      }
    }
  }
  const Index bytes = parts * out.dim * static_cast<Index>(sizeof(float));
  in_parts(work.threads, records, bytes, [&](Range some) {
    for (Index i = some.begin; i < some.end; ++i) {
      float* sum = found + i * out.dim;
      for (Index part = 1; part < parts; ++part) {
        merge<float>(sum + part * records * out.dim, sum, 1, out.dim);
      }
      merge<float>(sum, out.at(i / q.heads, i % q.heads), 1, out.dim);
    }
  });
  caught.rethrow();
}

template <class T>
void decode_parts_of(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                     const Where& where, const Mask& mask, const Work& work,
                     const std::vector<HeadGroup>& groups, const std::vector<Part>& parts) {
  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    const bool polls = omp_get_thread_num() == 0;
    Workspace memory;
    Work alone = work;
    alone.threads = 1;
    alone.workspace = &memory;
    if (!polls) alone.poll = {};
    const auto decode_part = [&](const Part& some) {
      decode_block(q.part(some.rows), k.part(some.keys), v.part(some.keys), out.part(some.rows),
                   where_of(where, some), mask, alone, groups);
    };
#pragma omp for schedule(dynamic)
    for (std::size_t i = 0; i < parts.size(); ++i) {
      if (polls) {
        caught.run([&] { decode_part(parts[i]); });
      } else {
        decode_part(parts[i]);
      }
    }
  }
  caught.rethrow();
}

}  // namespace

void decode(View<const float> q, View<const float> k, View<const float> v, View<float> out,
            const Where& where, const Mask& mask, const Work& work,
            const std::vector<HeadGroup>& groups) {
  decode_block(q, k, v, out, where, mask, work, groups);
}

void decode(View<const BFloat16> q, View<const BFloat16> k, View<const BFloat16> v, View<float> out,
            const Where& where, const Mask& mask, const Work& work,
            const std::vector<HeadGroup>& groups) {
  decode_block(q, k, v, out, where, mask, work, groups);
}

void decode_parts(View<const float> q, View<const float> k, View<const float> v, View<float> out,
                  const Where& where, const Mask& mask, const Work& work,
                  const std::vector<HeadGroup>& groups, const std::vector<Part>& parts) {
  decode_parts_of(q, k, v, out, where, mask, work, groups, parts);
}

void decode_parts(View<const BFloat16> q, View<const BFloat16> k, View<const BFloat16> v,
                  View<float> out, const Where& where, const Mask& mask, const Work& work,
                  const std::vector<HeadGroup>& groups, const std::vector<Part>& parts) {
  decode_parts_of(q, k, v, out, where, mask, work, groups, parts);
}

}  // namespace dattn
