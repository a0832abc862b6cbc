#include "kernels/attend_backward.hpp"

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/backward_units.hpp"
#include "kernels/check.hpp"
#include "kernels/key_order.hpp"
#include "kernels/residues.hpp"

namespace dattn {
namespace {

/// Bytes of keys, values and their gradients that one tile of queries meets before the next one
/// does: they stay in the second-level cache meanwhile.
constexpr Index kChunkBytes = 1400 << 10;
/// Where the mask leaves tiles out, so many times the tiles: a tile of queries is packed for each
/// chunk that it sees, and only those that it sees need stay in the cache.
constexpr Index kSparseChunk = 8;

/// Floats of a row of dK or dV in here.
Index padded(Index dim, const Kernel& kernel) {
  return (dim + kernel.pad - 1) / kernel.pad * kernel.pad;
}

/// Tiles of keys of a chunk where the mask leaves none out. `packs` is bytes of a packed tile.
Index tiles_of_chunk(Index packs, Index d_qk, Index d_v, const Kernel& kernel) {
  const Index sums = kernel.backward_tile * (padded(d_qk, kernel) + padded(d_v, kernel)) * 4;
  return std::max<Index>(1, kChunkBytes / (packs + sums));
}

template <class T>
class Worker {
 public:
  /// Chunks have `most_tiles` of keys, at most; `packs` is memory for as many.
  Worker(const BackwardBlock<T>& block, Index most_tiles, std::byte* packs)
      : block_(block),
        kernel_(block.kernel),
        lanes_(kernel_.lanes),
        panels_(kernel_.backward_panels),
        dk_row_(padded(block.q.dim, kernel_)),
        dv_row_(padded(block.v.dim, kernel_)),
        chunk_(
            tiles_of_chunk(block.k_bytes() + block.v_bytes(), block.q.dim, block.v.dim, kernel_)),
        most_tiles_(most_tiles),
        packs_(block, most_tiles, packs),
        q_(aligned(kernel_.q_backward_size(block.d_qk()))),
        d_o_(aligned(kernel_.q_backward_size(block.d_v()))),
        scratch_(aligned(kernel_.backward_scratch(block.d_qk(), block.d_v()))),
        dq_(panels_ * lanes_ * block.q.dim),
        dk_(most_tiles_ * kernel_.backward_tile * dk_row_),
        dv_(most_tiles_ * kernel_.backward_tile * dv_row_),
        lse_(panels_ * lanes_),
        delta_(panels_ * lanes_),
        row_of_(static_cast<std::size_t>(panels_ * lanes_)),
        head_of_(row_of_.size()),
        pieces_(static_cast<std::size_t>(panels_)),
        masks_(static_cast<std::size_t>(panels_), LaneMasks(kernel_.lanes, kernel_.backward_tile)) {
    for (const auto& keys : block.taken) {
      rules_.emplace_back(static_cast<std::size_t>(panels_),
                          PanelRules(keys->rules, kernel_.lanes, kernel_.backward_tile));
    }
  }

  /// Adds what the unit's keys give to dk, dv and, by rows, to `dq` times `factor`. Where `written`
  /// is given, dq is a copy of which only rows with a flag there hold numbers.
  void run(const Unit& unit, View<float> dq, float factor, View<char> written, Poller& poller) {
    for (Index from = unit.tiles.begin; from < unit.tiles.end;) {
      const Range tiles{from, chunk_end(unit, from)};
      for (Index g = unit.groups.begin; g < unit.groups.end; ++g) {
        chunk(g, tiles, dq, factor, written, poller);
      }
      from = tiles.end;
    }
  }

 private:
  /// Where the chunk that begins at tile `from` ends: some queries here and there see chunk_ tiles
  /// of it at most.
  Index chunk_end(const Unit& unit, Index from) const {
    constexpr Index kRows = 8;
    const Index most = std::min(unit.tiles.end, from + most_tiles_);
    if (most - from <= chunk_) return most;
    Index end = most;
    for (Index g = unit.groups.begin; g < unit.groups.end; ++g) {
      for (Index i = 0; i < kRows; ++i) {
        const Range rows = even_part(block_.q.rows, kRows, i);
        if (rows.empty()) continue;
        const Index row = (rows.begin + rows.end) / 2;
        const LiveRows live(block_.keys_of(g).where, block_.mask, block_.head(g), {row, row + 1},
                            block_.keys({from, end}));
        Index tiles = 0;
        Index next = from;  // the first tile not counted
        for (const Range span : live.of(row)) {
          const Range seen{std::max(next, span.begin / kernel_.backward_tile),
                           (span.end - 1) / kernel_.backward_tile + 1};
          if (tiles + seen.size() > chunk_) {
            end = std::min(end, seen.begin + chunk_ - tiles);
            break;
          }
          tiles += std::max<Index>(0, seen.size());
          next = std::max(next, seen.end);
        }
      }
    }
    return end;
  }

  void chunk(Index g, Range tiles, View<float> dq, float factor, View<char> written,
             Poller& poller) {
    const HeadGroup& group = block_.groups[static_cast<std::size_t>(g)];
    const TakenKeys& keys = block_.keys_of(g);
    const Index rows_of_tile = kernel_.backward_tile;
    // Of the queries, those that see some of the keys.
    const std::vector<SeenTile>& seen = block_.seen_by(g);
    Range seeing{block_.q.rows, 0};
    for (Index t = tiles.begin; t < tiles.end; ++t) {
      const Range rows = seen[static_cast<std::size_t>(t)].rows;
      if (rows.empty()) continue;
      seeing = {std::min(seeing.begin, rows.begin), std::max(seeing.end, rows.end)};
    }
    if (seeing.empty()) return;
    packs_.begin(tiles, group, keys);
    std::fill_n(dk_.get(), tiles.size() * rows_of_tile * dk_row_, 0.0f);
    std::fill_n(dv_.get(), tiles.size() * rows_of_tile * dv_row_, 0.0f);
    const Index lanes = block_.q.rows * group.heads.size();
    const Index size = panels_ * lanes_;
    const Index end = seeing.end * group.heads.size();
    bool any = false;
    for (Index first = seeing.begin * group.heads.size() / size * size; first < end;
         first += size) {
      const Range now{first, std::min(first + size, lanes)};
      const Range rows{group.row(now.begin), group.row(now.end - 1) + 1};
      const LiveRows live(keys.where, block_.mask, block_.head(g), rows, block_.keys(tiles));
      if (live.none()) continue;
      bool packed = false;
      const Index last = (live.bounds(rows).end + rows_of_tile - 1) / rows_of_tile;
      for (Index t = tiles.begin; t < last; ++t) {
        // Rows of many spans leave whole stretches of tiles out.
        t = std::max(t, live.next(block_.tile(t).begin) / rows_of_tile);
        if (t >= last || !find_pieces(live, now, group, block_.tile(t))) continue;
        if (!packed) {
          start(g, now);
          const Range next{rows.end, std::min(rows.end + rows.size(), seeing.end)};
          for (Index h = group.heads.begin; h < group.heads.end; ++h) {
            prefetch(block_.q, h, next);
            prefetch(block_.d_o, h, next);
          }
        }
        packed = true;
        step(g, live, t, (t - tiles.begin) * rows_of_tile);
        poller.after(static_cast<double>(now.size() * block_.tile(t).size()) *
                     static_cast<double>(6 * block_.q.dim + 4 * block_.v.dim));
      }
      if (packed) give_dq(now.size(), dq, factor, written);
      any = any || packed;
    }
    if (any) give_dkv(g, tiles);
  }

  /// What the panels see of a tile of keys; false: nothing.
  bool find_pieces(const LiveRows& live, Range lanes, const HeadGroup& group, Range tile) {
    bool any = false;
    used_ = (lanes.size() + lanes_ - 1) / lanes_;
    const Index part = lanes_ / kernel_.parts;
    for (Index p = 0; p < used_; ++p) {
      std::array<Range, 2> rows;
      std::size_t count = 0;
      const Range panel{lanes.begin + p * lanes_,
                        std::min(lanes.begin + (p + 1) * lanes_, lanes.end)};
      for (Index first = panel.begin; first < panel.end; first += part) {
        rows[count++] = {group.row(first), group.row(std::min(first + part, panel.end) - 1) + 1};
      }
      auto& pieces = pieces_[static_cast<std::size_t>(p)];
      live.pieces({rows.data(), count}, tile, kernel_.granule, pieces);
      any = any || !pieces.empty();
    }
    return any;
  }

  void start(Index g, Range lanes) {
    const HeadGroup& group = block_.groups[static_cast<std::size_t>(g)];
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
      if (!used || block_.normalizer == Normalizer::sigmoid) continue;
      const float lse = *block_.lse.at(row_of_[at], head_of_[at]);
      if (lse == -kInf) continue;
      lse_[i] = static_cast<float>(static_cast<double>(lse) / kernel_.nats);
      delta_[i] = *block_.delta.at(row_of_[at], head_of_[at]);
    }
    const auto used = static_cast<int>(used_);
    kernel_.pack_q_backward(q.data(), used, element_of<T>(), block_.d_qk(),
                            block_.keys_of(g).rules.factor(), q_.get());
    kernel_.pack_q_backward(d_o.data(), used, element_of<T>(), block_.d_v(), 1.0f, d_o_.get());
    for (Index p = 0; p < used_; ++p) {
      rules_of(g, p).lanes(panel(row_of_, p), panel(head_of_, p));
    }
  }

  std::span<const Index> panel(const std::vector<Index>& of_lane, Index p) const {
    return {of_lane.data() + p * lanes_, static_cast<std::size_t>(lanes_)};
  }

  PanelRules& rules_of(Index g, Index p) {
    return rules_[block_.taken_by[static_cast<std::size_t>(g)]][static_cast<std::size_t>(p)];
  }

  void step(Index g, const LiveRows& live, Index t, Index row) {
    const HeadGroup& group = block_.groups[static_cast<std::size_t>(g)];
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
      rules_of(g, p).keys(tile, group.key_head);
      rules.push_back(rules_of(g, p).rules());
    }
    kernel_.backward({.q = q_.get(),
                      .d_o = d_o_.get(),
                      .k = packs_.k(t),
                      .v = packs_.v(t),
                      .d_qk = block_.d_qk(),
                      .d_v = block_.d_v(),
                      .panels = static_cast<int>(used_),
                      .pieces = lists.data(),
                      .piece_counts = counts.data(),
                      .allowed = allowed.data(),
                      .rules = rules.data(),
                      .normalizer = block_.normalizer,
                      .scratch = scratch_.get(),
                      .lse = lse_.get(),
                      .delta = delta_.get(),
                      .dq = dq_.get(),
                      .dk = dk_.get() + row * dk_row_,
                      .dv = dv_.get() + row * dv_row_});
  }

  void give_dq(Index lanes, View<float> dq, float factor, View<char> written) const {
    std::vector<float*> row(static_cast<std::size_t>(lanes_));
    for (Index p = 0; p < used_; ++p) {
      for (Index i = 0; i < lanes_; ++i) {
        const auto at = static_cast<std::size_t>(p * lanes_ + i);
        float*& to = row[static_cast<std::size_t>(i)];
        to = p * lanes_ + i < lanes ? dq.at(row_of_[at], head_of_[at]) : nullptr;
        if (to == nullptr || written.data == nullptr) continue;
        char& flag = *written.at(row_of_[at], head_of_[at]);
        if (flag == 0) std::fill_n(to, dq.dim, 0.0f);
        flag = 1;
      }
      kernel_.add_panel(dq_.get() + p * lanes_ * block_.q.dim, block_.d_qk(), factor, row.data());
    }
  }

  void give_dkv(Index g, Range tiles) const {
    const HeadGroup& group = block_.groups[static_cast<std::size_t>(g)];
    const TakenKeys& taken = block_.keys_of(g);
    const Range keys = block_.keys(tiles);
    for (Index key = keys.begin; key < keys.end; ++key) {
      const float* dk = dk_.get() + (key - keys.begin) * dk_row_;
      const float* dv = dv_.get() + (key - keys.begin) * dv_row_;
      float* to_k = block_.dk.at(taken.row(key), group.key_head);
      float* to_v = block_.dv.at(taken.row(key), group.value_head);
      for (Index i = 0; i < block_.q.dim; ++i) to_k[i] += block_.scale * dk[i];
      for (Index i = 0; i < block_.v.dim; ++i) to_v[i] += dv[i];
    }
  }

  const BackwardBlock<T>& block_;
  const Kernel& kernel_;
  Index lanes_;
  Index panels_;
  Index dk_row_, dv_row_;
  Index chunk_;       ///< tiles of keys that stay in the cache,
  Index most_tiles_;  ///< and that a chunk has, at most
  BackwardPacks<T> packs_;
  Buffer<std::byte> q_, d_o_;
  Buffer<std::byte> scratch_;
  Buffer<float> dq_, dk_, dv_;
  Buffer<float> lse_, delta_;
  Index used_ = 0;                       ///< panels of the tile of queries at hand
  std::vector<Index> row_of_, head_of_;  ///< of each lane; -1 where there is none
  std::vector<std::vector<Piece>> pieces_;
  std::vector<LaneMasks> masks_;
  std::vector<std::vector<PanelRules>> rules_;  ///< by TakenKeys and panel
};

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
  const std::vector<Unit> units = units_of(block, clusters, parts);
  Index most_tiles = 0;  // of a chunk
  for (const Unit& unit : units) most_tiles = std::max(most_tiles, unit.tiles.size());
  most_tiles = std::min(most_tiles, kSparseChunk * tiles_of_chunk(block.k_bytes() + block.v_bytes(),
                                                                  q.dim, v.dim, kernel));
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
    Worker<T> worker(block, most_tiles, packs + omp_get_thread_num() * packs_bytes);
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
  const Index copies = parts > 1 ? parts * (numbers * 4 + queries * query_heads.size()) : 0;
  const Index sums =
      kernel.backward_tile * (padded(shape.d_qk, kernel) + padded(shape.d_v, kernel)) * 4;
  const Index chunk =
      std::min(tiles, kSparseChunk * tiles_of_chunk(pack, shape.d_qk, shape.d_v, kernel));
  const Index lanes = Index{kernel.backward_panels} * kernel.lanes;
  const Index worker = aligned(kernel.q_backward_size(d_qk)) +
                       aligned(kernel.q_backward_size(d_v)) +
                       aligned(kernel.backward_scratch(d_qk, d_v)) + lanes * shape.d_qk * 4 +
                       chunk * (pack + sums) + lanes * 24;
  // Orders of the keys, one for each head at most.
  const Index orders = query_heads.size() * keys * (8 + 4 * key_heads);
  // What each tile of keys is seen by: once, and of each thread.
  const Index seen = (query_heads.size() + threads) * tiles * 40;
  return copies + orders + seen + threads * worker;
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
