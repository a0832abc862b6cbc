#include "kernels/attend_backward.hpp"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/backward_units.hpp"
#include "kernels/backward_worker.hpp"
#include "kernels/check.hpp"
#include "kernels/dot.hpp"
#include "kernels/in_parts.hpp"
#include "kernels/part_sums.hpp"
#include "kernels/residues.hpp"

namespace dattn {
namespace {

/// Whether a thread takes all keys of a cluster, not single parts: of one thread, or where there
/// are enough clusters for all.
bool takes_clusters_whole(Index clusters, int threads) {
  constexpr Index kOfThread = 4;
  return threads == 1 || clusters >= kOfThread * threads;
}

/// Floats of the sums of dQ of a cluster, of the largest.
template <class T>
Index sums_of_cluster(const BackwardBlock<T>& block, const std::vector<Cluster>& clusters) {
  const Index lanes = Index{block.kernel.backward_panels} * block.kernel.lanes;
  Index most = 0;
  for (const Cluster& cluster : clusters) {
    Index floats = 0;
    for (Index g = cluster.begin; g < cluster.end; ++g) {
      const Index heads = block.groups[static_cast<std::size_t>(g)].heads.size();
      floats += PartSums::floats((block.q.rows * heads + lanes - 1) / lanes, lanes * block.q.dim);
    }
    most = std::max(most, floats);
  }
  return most;
}

/// Each cluster by one thread, which needs no copies of dQ by parts.
template <class T>
void backward_whole(const BackwardBlock<T>& block, const std::vector<Cluster>& clusters,
                    std::vector<Unit>& units, Index most_tiles, const Work& work) {
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
    return std::pair(a.groups.begin, a.part) < std::pair(b.groups.begin, b.part);
  });
  std::vector<std::span<const Unit>> of_cluster;
  for (const Unit& unit : units) {
    if (!of_cluster.empty() && of_cluster.back().front().groups == unit.groups) {
      of_cluster.back() = {&of_cluster.back().front(), of_cluster.back().size() + 1};
    } else {
      of_cluster.push_back({&unit, 1});
    }
  }
  const auto area_of = [](std::span<const Unit> parts) {
    double sum = 0;
    for (const Unit& unit : parts) sum += unit.area;
    return sum;
  };
  // The longest first, so that no thread starts one when the others are done.
  std::stable_sort(of_cluster.begin(), of_cluster.end(),
                   [&](const auto& a, const auto& b) { return area_of(a) > area_of(b); });
  const Index packs_bytes = BackwardPacks<T>::bytes(block, most_tiles);
  const Index sums = sums_of_cluster(block, clusters);
  CallWorkspace workspace(work);
  auto* packs = workspace.take<std::byte>(Workspace::Use::k, work.threads * packs_bytes);
  auto* memory = workspace.take<float>(Workspace::Use::partials, work.threads * sums);
  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    const Entered entered(block.kernel);
    const Index thread = omp_get_thread_num();
    Poller poller(work.poll, caught, thread == 0);
    BackwardWorker<T> worker(block, most_tiles, packs + thread * packs_bytes);
#pragma omp for schedule(dynamic)
    for (std::size_t i = 0; i < of_cluster.size(); ++i) {
      const std::span<const Unit> parts = of_cluster[i];
      worker.run_all(parts.front().groups, parts, memory + thread * sums, poller);
    }
  }
  caught.rethrow();
}

template <class T>
void backward_block(View<const T> q, View<const T> k, View<const T> v, View<const T> d_o,
                    View<const float> lse, View<const float> delta, View<float> dq, View<float> dk,
                    View<float> dv, const Where& where, const Mask& mask, const Work& work) {
  const Kernel& kernel = kernel_of<T>(work);
  BackwardBlock<T> block{q,
                         k,
                         v,
                         d_o,
                         lse,
                         delta,
                         dq,
                         dk,
                         dv,
                         where,
                         mask,
                         kernel,
                         work.score.sigmoid ? Normalizer::sigmoid : Normalizer::softmax,
                         static_cast<float>(work.score.scale),
                         head_groups(where, mask),
                         (k.rows + kernel.backward_tile - 1) / kernel.backward_tile,
                         {},
                         {},
                         {}};
  const std::vector<Cluster> clusters = clusters_of(block.groups);
  take_keys(block, clusters, work.score);
  look_at_tiles(block, work);
  const auto count = static_cast<Index>(clusters.size());
  // Each part has its own copy, and they are added up in their order.
  const Index dq_size = q.rows * q.heads * q.dim;
  const Index parts = sparse_parts(block, clusters, parts_of(count, block.tiles, dq_size));
  const bool whole = parts > 1 && takes_clusters_whole(count, work.threads);
  std::vector<Unit> units = units_of(block, clusters, parts);
  Index most_tiles = whole ? block.tiles : 0;  // of a chunk
  for (const Unit& unit : units) most_tiles = std::max(most_tiles, unit.tiles.size());
  most_tiles = std::min(most_tiles, kSparseChunk * tiles_of_chunk(block.k_bytes() + block.v_bytes(),
                                                                  q.dim, v.dim, kernel));
  if (whole) {
    backward_whole(block, clusters, units, most_tiles, work);
    return;
  }
  CallWorkspace workspace(work);
  auto* copies =
      parts > 1 ? workspace.take<float>(Workspace::Use::partials, parts * dq_size) : nullptr;
  const auto copy = [&](Index part) {
    return View<float>{copies + part * dq_size, q.rows, q.heads, q.dim};
  };
  // Which rows of a copy somebody has written; the others are not even zero.
  std::vector<char> written(parts > 1 ? static_cast<std::size_t>(parts * q.rows * q.heads) : 0);
  const auto flags = [&](Index part) {  // those of a row side by side
    return View<char>{written.data() + part, q.rows, q.heads, parts};
  };
  const Index packs_bytes = BackwardPacks<T>::bytes(block, most_tiles);
  auto* packs = workspace.take<std::byte>(Workspace::Use::k, work.threads * packs_bytes);
  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    const Entered entered(kernel);
    Poller poller(work.poll, caught, omp_get_thread_num() == 0);
    BackwardWorker<T> worker(block, most_tiles, packs + omp_get_thread_num() * packs_bytes);
#pragma omp for schedule(dynamic)
    for (std::size_t i = 0; i < units.size(); ++i) {
      const Unit& unit = units[i];
      if (parts > 1) {
        worker.run(unit, copy(unit.part), 1.0f, flags(unit.part), poller);
      } else {
        worker.run(unit, dq, block.scale, {}, poller);
      }
    }
    if (parts > 1) {
      std::vector<float> sum(static_cast<std::size_t>(q.dim));
#pragma omp for schedule(static)
      for (Index row = 0; row < q.rows; ++row) {
        for (Index h = 0; h < q.heads; ++h) {
          std::fill(sum.begin(), sum.end(), 0.0f);
          for (Index part = 0; part < parts; ++part) {
            if (*flags(part).at(row, h) == 0) continue;
            const float* from = copy(part).at(row, h);
            for (Index i = 0; i < q.dim; ++i) sum[static_cast<std::size_t>(i)] += from[i];
          }
          float* to = dq.at(row, h);
          for (Index i = 0; i < q.dim; ++i) to[i] += block.scale * sum[static_cast<std::size_t>(i)];
        }
        poller.after(static_cast<double>(parts * q.heads * q.dim));
      }
    }
  }
  caught.rethrow();
}

/// The residues of a mask that has a step, one by one.
template <class T>
void backward_by_residues(View<const T> q, View<const T> k, View<const T> v, View<const T> d_o,
                          View<const float> lse, View<const float> delta, View<float> dq,
                          View<float> dk, View<float> dv, const Where& where, const Mask& mask,
                          const Work& work) {
  check_attend_backward(q, k, v, d_o, lse, delta, dq, dk, dv, where, work);
  if (q.size() == 0 || k.rows == 0) return;
  if (steps_differ(where, mask)) {
    for (const HeadGroup& group : head_groups(where, mask)) {
      const Range key_head{group.key_head, group.key_head + 1};
      const Range value_head{group.value_head, group.value_head + 1};
      backward_by_residues(q.only(group.heads), k.only(key_head), v.only(value_head),
                           d_o.only(group.heads), lse.only(group.heads), delta.only(group.heads),
                           dq.only(group.heads), dk.only(key_head), dv.only(value_head),
                           group_in_order(where, group, {}), mask, work);
    }
    return;
  }
  if (const auto masks = apart(where, mask); !masks.empty()) {
    for (const MaskPtr& one : masks) {
      backward_by_residues(q, k, v, d_o, lse, delta, dq, dk, dv, where, *one, work);
    }
    return;
  }
  const std::vector<Residue> residues = residues_of(where, mask);
  if (residues.empty()) {
    return backward_block(q, k, v, d_o, lse, delta, dq, dk, dv, where, mask, work);
  }
  for (const Residue& r : residues) {
    backward_block(r.queries.of(q), r.keys.of(k), r.keys.of(v), r.queries.of(d_o),
                   r.queries.of(lse), r.queries.of(delta), r.queries.of(dq), r.keys.of(dk),
                   r.keys.of(dv), r.where, mask, work);
  }
}

template <class T, class G>
void delta_rows(View<const T> o, View<const G> d_o, View<T> out, int threads) {
  CHECK(o.rows == d_o.rows && o.heads == d_o.heads && o.dim == d_o.dim, o.rows, o.heads, o.dim);
  CHECK(out.rows == o.rows && out.heads == o.heads && out.dim >= 1, out.rows, out.heads, out.dim);
  const Index bytes = o.heads * o.dim * static_cast<Index>(sizeof(T) + sizeof(G));
  in_parts(threads, o.rows, bytes, [&](Range rows) {
    for (Index row = rows.begin; row < rows.end; ++row) {
      for (Index h = 0; h < o.heads; ++h) {
        *out.at(row, h) = static_cast<T>(dot(o.at(row, h), d_o.at(row, h), o.dim));
      }
    }
  });
}

}  // namespace

void attend_backward(View<const float> q, View<const float> k, View<const float> v,
                     View<const float> d_o, View<const float> lse, View<const float> delta,
                     View<float> dq, View<float> dk, View<float> dv, const Where& where,
                     const Mask& mask, const Work& work) {
  backward_by_residues(q, k, v, d_o, lse, delta, dq, dk, dv, where, mask, work);
}

void attend_backward(View<const BFloat16> q, View<const BFloat16> k, View<const BFloat16> v,
                     View<const BFloat16> d_o, View<const float> lse, View<const float> delta,
                     View<float> dq, View<float> dk, View<float> dv, const Where& where,
                     const Mask& mask, const Work& work) {
  backward_by_residues(q, k, v, d_o, lse, delta, dq, dk, dv, where, mask, work);
}

Index attend_backward_bytes(const Shape& shape, Index queries, Range query_heads, Index keys,
                            Index key_heads, int threads, const Kernel& kernel) {
  const auto d_qk = static_cast<int>(shape.d_qk);
  const auto d_v = static_cast<int>(shape.d_v);
  const Index tiles = (keys + kernel.backward_tile - 1) / kernel.backward_tile;
  const Index pack = aligned(kernel.k_backward_size(d_qk)) + aligned(kernel.v_backward_size(d_v));
  // Query heads that share no key or value head are clusters of their own.
  const Index unit =
      std::lcm(shape.query_heads / shape.key_heads, shape.query_heads / shape.value_heads);
  const Index clusters = (query_heads.end - 1) / unit - query_heads.begin / unit + 1;
  const Index numbers = queries * query_heads.size() * shape.d_qk;
  const Index parts = parts_of(clusters, tiles, numbers);
  const Index lanes = Index{kernel.backward_panels} * kernel.lanes;
  Index copies = 0;
  if (parts > 1 && takes_clusters_whole(clusters, threads)) {
    copies = threads * PartSums::floats((queries + lanes) * unit, shape.d_qk) * 4;
  } else if (parts > 1) {
    copies = parts * (numbers * 4 + queries * query_heads.size());
  }
  const Index sums =
      kernel.backward_tile * (padded(shape.d_qk, kernel) + padded(shape.d_v, kernel)) * 4;
  const Index chunk =
      std::min(tiles, kSparseChunk * tiles_of_chunk(pack, shape.d_qk, shape.d_v, kernel));
  const Index worker =
      aligned(kernel.q_backward_size(d_qk)) + aligned(kernel.q_backward_size(d_v)) +
      aligned(kernel.backward_scratch(d_qk, d_v)) + (lanes + kernel.lanes) * shape.d_qk * 4 +
      chunk * (pack + sums) + lanes * 24 + KnownSteps::kBytes;
  // Orders of the keys, one for each head at most.
  const Index orders = query_heads.size() * keys * (8 + 4 * key_heads);
  // What each tile of keys is seen by: once, and of each thread.
  const Index seen = (query_heads.size() + threads) * tiles * 40;
  return copies + orders + seen + threads * worker;
}

void delta_of(View<const float> o, View<const float> d_o, View<float> out, int threads) {
  delta_rows(o, d_o, out, threads);
}
void delta_of(View<const float> o, View<const BFloat16> d_o, View<float> out, int threads) {
  delta_rows(o, d_o, out, threads);
}
void delta_of(View<const double> o, View<const double> d_o, View<double> out, int threads) {
  delta_rows(o, d_o, out, threads);
}

}  // namespace dattn
