#include "kernels/attend_backward.hpp"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "kernels/area.hpp"
#include "kernels/check.hpp"
#include "kernels/panel.hpp"

namespace dattn {
namespace {

/// Units of work that a block is cut into, at most and where it is large enough. Not the number of
/// threads, so that the bits of a result do not depend on it.
constexpr Index kUnits = 64;
/// Tiles of keys of a unit, at least.
constexpr Index kTilesOfPart = 4;
/// Bytes of keys, values and their gradients that one tile of queries meets before the next one
/// does: they stay in the second-level cache meanwhile.
constexpr Index kChunkBytes = 1400 << 10;
/// Bytes for dQ by parts of the keys.
constexpr Index kPartBytes = Index{1} << 30;

template <class T>
struct Block {
  View<const T> q, k, v, d_o;
  View<const float> lse, delta;
  View<float> dq, dk, dv;
  const Where& where;
  const Mask& mask;
  const Kernel& kernel;
  BlockRules rules;
  float scale;
  std::vector<HeadGroup> groups;
  Index tiles;  ///< of keys

  Range tile(Index t) const {
    return {t * kernel.backward_tile, std::min<Index>(k.rows, (t + 1) * kernel.backward_tile)};
  }
  int d_qk() const { return static_cast<int>(q.dim); }
  int d_v() const { return static_cast<int>(v.dim); }
  Index k_bytes() const { return aligned(kernel.k_backward_size(d_qk())); }
  Index v_bytes() const { return aligned(kernel.v_backward_size(d_v())); }
};

/// Groups [groups.begin, groups.end) add to the same gradients of K or V and belong to one thread.
using Cluster = Range;

std::vector<Cluster> clusters_of(const std::vector<HeadGroup>& groups) {
  std::vector<Cluster> out;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const auto i = static_cast<Index>(g);
    if (g > 0 && (groups[g].key_head == groups[g - 1].key_head ||
                  groups[g].value_head == groups[g - 1].value_head)) {
      out.back().end = i + 1;
    } else {
      out.push_back({i, i + 1});
    }
  }
  return out;
}

/// One part of the work: a cluster and tiles of keys.
struct Unit {
  Cluster groups;
  Range tiles;
  Index part;
  double area;
};

/// Packed tiles of all key heads and value heads of the block, all threads' to read.
template <class T>
class Packs {
 public:
  Packs(const Block<T>& block, CallWorkspace& workspace)
      : block_(block),
        k_(workspace.take<std::byte>(Workspace::Use::k,
                                     block.k.heads * block.tiles * block.k_bytes())),
        v_(workspace.take<std::byte>(Workspace::Use::v,
                                     block.v.heads * block.tiles * block.v_bytes())) {}

  Index jobs() const { return (block_.k.heads + block_.v.heads) * block_.tiles; }
  void fill(Index job) {
    const Index head = job / block_.tiles;
    const Index t = job % block_.tiles;
    if (head < block_.k.heads) {
      block_.kernel.pack_k_backward(rows_of(block_.k, head, block_.tile(t)), k(head, t));
    } else {
      const Index h = head - block_.k.heads;
      block_.kernel.pack_v_backward(rows_of(block_.v, h, block_.tile(t)), v(h, t));
    }
  }
  std::byte* k(Index head, Index t) const {
    return k_ + (head * block_.tiles + t) * block_.k_bytes();
  }
  std::byte* v(Index head, Index t) const {
    return v_ + (head * block_.tiles + t) * block_.v_bytes();
  }

 private:
  const Block<T>& block_;
  std::byte* k_;
  std::byte* v_;
};

template <class T>
class Worker {
 public:
  explicit Worker(const Block<T>& block)
      : block_(block),
        kernel_(block.kernel),
        lanes_(kernel_.lanes),
        panels_(kernel_.backward_panels),
        dk_row_((block.q.dim + kernel_.pad - 1) / kernel_.pad * kernel_.pad),
        dv_row_((block.v.dim + kernel_.pad - 1) / kernel_.pad * kernel_.pad),
        chunk_(std::max<Index>(1, kChunkBytes / (block.k_bytes() + block.v_bytes() +
                                                 kernel_.backward_tile * (dk_row_ + dv_row_) * 4))),
        q_(aligned(kernel_.q_backward_size(block.d_qk()))),
        d_o_(aligned(kernel_.q_backward_size(block.d_v()))),
        scratch_(aligned(kernel_.backward_scratch(block.d_qk(), block.d_v()))),
        dq_(panels_ * lanes_ * block.q.dim),
        dk_(chunk_ * kernel_.backward_tile * dk_row_),
        dv_(chunk_ * kernel_.backward_tile * dv_row_),
        lse_(panels_ * lanes_),
        delta_(panels_ * lanes_),
        row_of_(static_cast<std::size_t>(panels_ * lanes_)),
        head_of_(row_of_.size()),
        pieces_(static_cast<std::size_t>(panels_)),
        masks_(static_cast<std::size_t>(panels_), LaneMasks(kernel_.lanes, kernel_.backward_tile)),
        rules_(static_cast<std::size_t>(panels_),
               PanelRules(block.rules, kernel_.lanes, kernel_.backward_tile)) {}

  /// Adds what the unit's keys give to dk, dv and, by rows, to `dq` times `factor`. Where `written`
  /// is given, dq is a copy of which only rows with a flag there, [row][head], hold numbers.
  void run(const Unit& unit, const Packs<T>& packs, View<float> dq, float factor, char* written,
           Poller& poller) {
    for (Index from = unit.tiles.begin; from < unit.tiles.end; from += chunk_) {
      const Range tiles{from, std::min(from + chunk_, unit.tiles.end)};
      for (Index g = unit.groups.begin; g < unit.groups.end; ++g) {
        chunk(block_.groups[static_cast<std::size_t>(g)], tiles, packs, dq, factor, written,
              poller);
      }
    }
  }

 private:
  void chunk(const HeadGroup& group, Range tiles, const Packs<T>& packs, View<float> dq,
             float factor, char* written, Poller& poller) {
    const Index rows_of_tile = kernel_.backward_tile;
    std::fill_n(dk_.get(), tiles.size() * rows_of_tile * dk_row_, 0.0f);
    std::fill_n(dv_.get(), tiles.size() * rows_of_tile * dv_row_, 0.0f);
    const Index lanes = block_.q.rows * group.heads.size();
    bool any = false;
    for (Index first = 0; first < lanes; first += panels_ * lanes_) {
      const Range now{first, std::min(first + panels_ * lanes_, lanes)};
      const Range rows{group.row(now.begin), group.row(now.end - 1) + 1};
      const LiveRows live(block_.where, block_.mask,
                          block_.where.query_heads.begin + group.heads.begin, rows);
      if (live.none()) continue;
      bool packed = false;
      const Range seen = live.bounds(rows);
      for (Index t = tiles.begin; t < tiles.end; ++t) {
        if (intersect(seen, block_.tile(t)).empty()) continue;
        if (!find_pieces(live, now, group, block_.tile(t))) continue;
        if (!packed) start(group, now);
        packed = true;
        step(group, live, t, packs, (t - tiles.begin) * rows_of_tile);
        poller.after(static_cast<double>(now.size() * block_.tile(t).size()) *
                     static_cast<double>(6 * block_.q.dim + 4 * block_.v.dim));
      }
      if (packed) give_dq(now.size(), dq, factor, written);
      any = any || packed;
    }
    if (any) give_dkv(group, tiles);
  }

  /// What the panels see of a tile of keys; false: nothing.
  bool find_pieces(const LiveRows& live, Range lanes, const HeadGroup& group, Range tile) {
    bool any = false;
    used_ = (lanes.size() + lanes_ - 1) / lanes_;
    for (Index p = 0; p < used_; ++p) {
      const Index first = lanes.begin + p * lanes_;
      const Index last = std::min(first + lanes_, lanes.end) - 1;
      auto& pieces = pieces_[static_cast<std::size_t>(p)];
      live.pieces({group.row(first), group.row(last) + 1}, tile, kernel_.granule, pieces);
      any = any || !pieces.empty();
    }
    return any;
  }

  void start(const HeadGroup& group, Range lanes) {
    std::fill_n(dq_.get(), used_ * lanes_ * block_.q.dim, 0.0f);
    std::vector<const void*> q(row_of_.size());
    std::vector<const void*> d_o(row_of_.size());
    constexpr float kInf = std::numeric_limits<float>::infinity();
    for (Index i = 0; i < panels_ * lanes_; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const bool used = lanes.begin + i < lanes.end;
      row_of_[at] = used ? group.row(lanes.begin + i) : -1;
      head_of_[at] = used ? group.head(lanes.begin + i) : -1;
      q[at] = used ? block_.q.at(row_of_[at], head_of_[at]) : nullptr;
      d_o[at] = used ? block_.d_o.at(row_of_[at], head_of_[at]) : nullptr;
      lse_[i] = kInf;
      delta_[i] = 0;
      if (!used || block_.rules.normalizer() == Normalizer::sigmoid) continue;
      const float lse = *block_.lse.at(row_of_[at], head_of_[at]);
      if (lse == -kInf) continue;
      lse_[i] = static_cast<float>(static_cast<double>(lse) / kernel_.nats);
      delta_[i] = *block_.delta.at(row_of_[at], head_of_[at]);
    }
    const auto used = static_cast<int>(used_);
    kernel_.pack_q_backward(q.data(), used, element_of<T>(), block_.d_qk(), block_.rules.factor(),
                            q_.get());
    kernel_.pack_q_backward(d_o.data(), used, element_of<T>(), block_.d_v(), 1.0f, d_o_.get());
    for (Index p = 0; p < used_; ++p) {
      rules_[static_cast<std::size_t>(p)].lanes(panel(row_of_, p), panel(head_of_, p));
    }
  }

  std::span<const Index> panel(const std::vector<Index>& of_lane, Index p) const {
    return {of_lane.data() + p * lanes_, static_cast<std::size_t>(lanes_)};
  }

  void step(const HeadGroup& group, const LiveRows& live, Index t, const Packs<T>& packs,
            Index row) {
    const Range tile = block_.tile(t);
    std::vector<const Piece*> lists;
    std::vector<int> counts;
    std::vector<Lanes> allowed;
    std::vector<ScoreRules> rules;
    for (Index p = 0; p < used_; ++p) {
      const auto at = static_cast<std::size_t>(p);
      const std::vector<Piece>& pieces = pieces_[at];
      lists.push_back(pieces.data());
      counts.push_back(static_cast<int>(pieces.size()));
      const bool masked =
          std::any_of(pieces.begin(), pieces.end(), [](const Piece& x) { return x.masked; });
      allowed.push_back(masked ? masks_[at].spell(live, panel(row_of_, p), tile) : Lanes{});
      rules_[at].keys(tile, group.key_head);
      rules.push_back(rules_[at].rules());
    }
    kernel_.backward({.q = q_.get(),
                      .d_o = d_o_.get(),
                      .k = packs.k(group.key_head, t),
                      .v = packs.v(group.value_head, t),
                      .d_qk = block_.d_qk(),
                      .d_v = block_.d_v(),
                      .panels = static_cast<int>(used_),
                      .pieces = lists.data(),
                      .piece_counts = counts.data(),
                      .allowed = allowed.data(),
                      .rules = rules.data(),
                      .normalizer = block_.rules.normalizer(),
                      .scratch = scratch_.get(),
                      .lse = lse_.get(),
                      .delta = delta_.get(),
                      .dq = dq_.get(),
                      .dk = dk_.get() + row * dk_row_,
                      .dv = dv_.get() + row * dv_row_});
  }

  void give_dq(Index lanes, View<float> dq, float factor, char* written) const {
    std::vector<float*> row(static_cast<std::size_t>(lanes_));
    for (Index p = 0; p < used_; ++p) {
      for (Index i = 0; i < lanes_; ++i) {
        const auto at = static_cast<std::size_t>(p * lanes_ + i);
        float*& to = row[static_cast<std::size_t>(i)];
        to = p * lanes_ + i < lanes ? dq.at(row_of_[at], head_of_[at]) : nullptr;
        if (to == nullptr || written == nullptr) continue;
        char& flag = written[row_of_[at] * dq.heads + head_of_[at]];
        if (flag == 0) std::fill_n(to, dq.dim, 0.0f);
        flag = 1;
      }
      kernel_.add_panel(dq_.get() + p * lanes_ * block_.q.dim, block_.d_qk(), factor, row.data());
    }
  }

  void give_dkv(const HeadGroup& group, Range tiles) const {
    const Range keys{block_.tile(tiles.begin).begin, block_.tile(tiles.end - 1).end};
    for (Index key = keys.begin; key < keys.end; ++key) {
      const float* dk = dk_.get() + (key - keys.begin) * dk_row_;
      const float* dv = dv_.get() + (key - keys.begin) * dv_row_;
      float* to_k = block_.dk.at(key, group.key_head);
      float* to_v = block_.dv.at(key, group.value_head);
      for (Index i = 0; i < block_.q.dim; ++i) to_k[i] += block_.scale * dk[i];
      for (Index i = 0; i < block_.v.dim; ++i) to_v[i] += dv[i];
    }
  }

  const Block<T>& block_;
  const Kernel& kernel_;
  Index lanes_;
  Index panels_;
  Index dk_row_, dv_row_;
  Index chunk_;  ///< tiles of keys
  Buffer<std::byte> q_, d_o_;
  Buffer<std::byte> scratch_;
  Buffer<float> dq_, dk_, dv_;
  Buffer<float> lse_, delta_;
  Index used_ = 0;                       ///< panels of the tile of queries at hand
  std::vector<Index> row_of_, head_of_;  ///< of each lane; -1 where there is none
  std::vector<std::vector<Piece>> pieces_;
  std::vector<LaneMasks> masks_;
  std::vector<PanelRules> rules_;
};

/// Cuts the keys of each cluster into at most `parts` parts of much the same allowed area.
template <class T>
std::vector<Unit> units_of(const Block<T>& block, const std::vector<Cluster>& clusters,
                           Index parts) {
  std::vector<Unit> units;
  std::map<Index, std::vector<double>> areas;  // of the tiles, by variant
  for (const Cluster& cluster : clusters) {
    std::vector<double> until{0};  // area of the tiles before
    for (Index t = 0; t < block.tiles; ++t) {
      double sum = 0;
      for (Index g = cluster.begin; g < cluster.end; ++g) {
        const HeadGroup& group = block.groups[static_cast<std::size_t>(g)];
        const Index head = block.where.query_heads.begin + group.heads.begin;
        std::vector<double>& known = areas[block.mask.variant(head)];
        if (static_cast<Index>(known.size()) == t) {
          known.push_back(static_cast<double>(
              area(block.mask, head, block.where.queries, part(block.where.keys, block.tile(t)))));
        }
        sum += static_cast<double>(group.heads.size()) * known[static_cast<std::size_t>(t)];
      }
      until.push_back(until.back() + sum);
    }
    if (until.back() == 0) continue;
    Index begin = 0;
    for (Index p = 0; p < parts && begin < block.tiles; ++p) {
      const double goal = until.back() * static_cast<double>(p + 1) / static_cast<double>(parts);
      Index end = begin + 1;
      while (end < block.tiles && (p + 1 == parts || until[static_cast<std::size_t>(end)] < goal)) {
        ++end;
      }
      units.push_back(
          {cluster,
           {begin, end},
           p,
           until[static_cast<std::size_t>(end)] - until[static_cast<std::size_t>(begin)]});
      begin = end;
    }
  }
  // The longest first, so that no thread starts one when the others are done.
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.area > b.area; });
  return units;
}

/// Into how many parts the keys are cut, each with a copy of dQ of so many numbers: parts add to dQ
/// of the same rows.
Index parts_of(Index clusters, Index tiles, Index dq_numbers) {
  const Index copies = kPartBytes / (dq_numbers * static_cast<Index>(sizeof(float)));
  return std::clamp<Index>((kUnits + clusters - 1) / clusters, 1,
                           std::max<Index>(1, std::min(tiles / kTilesOfPart, copies)));
}

template <class T>
void backward_block(View<const T> q, View<const T> k, View<const T> v, View<const T> d_o,
                    View<const float> lse, View<const float> delta, View<float> dq, View<float> dk,
                    View<float> dv, const Where& where, const Mask& mask, const Work& work) {
  check_attend_backward(q, k, v, d_o, lse, delta, dq, dk, dv, where, work);
  if (q.size() == 0 || k.rows == 0) return;
  const Kernel& kernel = kernel_of<T>(work);
  const Block<T> block{q,
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
                       BlockRules(work.score, where, kernel),
                       static_cast<float>(work.score.scale),
                       head_groups(where, mask),
                       (k.rows + kernel.backward_tile - 1) / kernel.backward_tile};
  const std::vector<Cluster> clusters = clusters_of(block.groups);
  const auto count = static_cast<Index>(clusters.size());
  // Each part has its own copy, and they are added up in their order.
  const Index dq_size = q.rows * q.heads * q.dim;
  const Index parts = parts_of(count, block.tiles, dq_size);
  const std::vector<Unit> units = units_of(block, clusters, parts);
  CallWorkspace workspace(work);
  auto* copies =
      parts > 1 ? workspace.take<float>(Workspace::Use::partials, parts * dq_size) : nullptr;
  const auto copy = [&](Index part) {
    return View<float>{copies + part * dq_size, q.rows, q.heads, q.dim};
  };
  // Which rows of a copy somebody has written; the others are not even zero.
  std::vector<char> written(parts > 1 ? static_cast<std::size_t>(parts * q.rows * q.heads) : 0);
  const auto flags = [&](Index part) { return written.data() + part * q.rows * q.heads; };
  Packs<T> packs(block, workspace);
  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    const Entered entered(kernel);
    Poller poller(work.poll, caught, omp_get_thread_num() == 0);
#pragma omp for schedule(dynamic, 4)
    for (Index job = 0; job < packs.jobs(); ++job) {
      packs.fill(job);
      poller.after(static_cast<double>(kernel.backward_tile * (k.dim + v.dim)) * 8);
    }
    Worker<T> worker(block);
#pragma omp for schedule(dynamic)
    for (std::size_t i = 0; i < units.size(); ++i) {
      const Unit& unit = units[i];
      if (parts > 1) {
        worker.run(unit, packs, copy(unit.part), 1.0f, flags(unit.part), poller);
      } else {
        worker.run(unit, packs, dq, block.scale, nullptr, poller);
      }
    }
    if (parts > 1) {
      std::vector<float> sum(static_cast<std::size_t>(q.dim));
#pragma omp for schedule(static)
      for (Index row = 0; row < q.rows; ++row) {
        for (Index h = 0; h < q.heads; ++h) {
          std::fill(sum.begin(), sum.end(), 0.0f);
          for (Index part = 0; part < parts; ++part) {
            if (flags(part)[row * q.heads + h] == 0) continue;
            const float* from = copy(part).at(row, h);
            for (Index i = 0; i < q.dim; ++i) sum[static_cast<std::size_t>(i)] += from[i];
          }
          float* to = dq.at(row, h);
          for (Index i = 0; i < q.dim; ++i) to[i] += block.scale * sum[static_cast<std::size_t>(i)];
        }
      }
    }
  }
  caught.rethrow();
}

template <class T, class G>
void delta_rows(View<const T> o, View<const G> d_o, View<T> out) {
  CHECK(o.rows == d_o.rows && o.heads == d_o.heads && o.dim == d_o.dim, o.rows, o.heads, o.dim);
  CHECK(out.rows == o.rows && out.heads == o.heads && out.dim >= 1, out.rows, out.heads, out.dim);
  for (Index row = 0; row < o.rows; ++row) {
    for (Index h = 0; h < o.heads; ++h) {
      double sum = 0;
      for (Index i = 0; i < o.dim; ++i) {
        sum += static_cast<double>(o.at(row, h)[i]) * static_cast<double>(d_o.at(row, h)[i]);
      }
      *out.at(row, h) = static_cast<T>(sum);
    }
  }
}

}  // namespace

void attend_backward(View<const float> q, View<const float> k, View<const float> v,
                     View<const float> d_o, View<const float> lse, View<const float> delta,
                     View<float> dq, View<float> dk, View<float> dv, const Where& where,
                     const Mask& mask, const Work& work) {
  backward_block(q, k, v, d_o, lse, delta, dq, dk, dv, where, mask, work);
}

void attend_backward(View<const BFloat16> q, View<const BFloat16> k, View<const BFloat16> v,
                     View<const BFloat16> d_o, View<const float> lse, View<const float> delta,
                     View<float> dq, View<float> dk, View<float> dv, const Where& where,
                     const Mask& mask, const Work& work) {
  backward_block(q, k, v, d_o, lse, delta, dq, dk, dv, where, mask, work);
}

Index attend_backward_bytes(const Shape& shape, Index queries, Range query_heads, Index keys,
                            Index key_heads, Index value_heads, int threads,
                            const Kernel& kernel) {
  const auto d_qk = static_cast<int>(shape.d_qk);
  const auto d_v = static_cast<int>(shape.d_v);
  const Index tiles = (keys + kernel.backward_tile - 1) / kernel.backward_tile;
  const Index k_bytes = aligned(kernel.k_backward_size(d_qk));
  const Index v_bytes = aligned(kernel.v_backward_size(d_v));
  const Index packs = tiles * (key_heads * k_bytes + value_heads * v_bytes);
  // Query heads that share no key or value head are clusters of their own.
  const Index unit =
      std::lcm(shape.query_heads / shape.key_heads, shape.query_heads / shape.value_heads);
  const Index clusters = (query_heads.end - 1) / unit - query_heads.begin / unit + 1;
  const Index numbers = queries * query_heads.size() * shape.d_qk;
  const Index parts = parts_of(clusters, tiles, numbers);
  const Index copies = parts > 1 ? parts * (numbers * 4 + queries * query_heads.size()) : 0;
  const auto padded = [&](Index dim) { return (dim + kernel.pad - 1) / kernel.pad * kernel.pad; };
  const Index sums = kernel.backward_tile * (padded(shape.d_qk) + padded(shape.d_v)) * 4;
  const Index chunk = std::max<Index>(1, kChunkBytes / (k_bytes + v_bytes + sums));
  const Index lanes = Index{kernel.backward_panels} * kernel.lanes;
  const Index worker = aligned(kernel.q_backward_size(d_qk)) +
                       aligned(kernel.q_backward_size(d_v)) +
                       aligned(kernel.backward_scratch(d_qk, d_v)) + lanes * shape.d_qk * 4 +
                       chunk * sums + lanes * 24;
  return packs + copies + threads * worker;
}

void delta_of(View<const float> o, View<const float> d_o, View<float> out) {
  delta_rows(o, d_o, out);
}
void delta_of(View<const float> o, View<const BFloat16> d_o, View<float> out) {
  delta_rows(o, d_o, out);
}
void delta_of(View<const double> o, View<const double> d_o, View<double> out) {
  delta_rows(o, d_o, out);
}

}  // namespace dattn
