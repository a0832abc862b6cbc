#pragma once

// One thread of attend_backward: the folder's own, not for others to include.

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "kernels/backward_units.hpp"
#include "kernels/part_sums.hpp"
#include "kernels/tile_slots.hpp"
#include "kernels/unit_steps.hpp"

namespace dattn {

/// Bytes of keys, values and their gradients that one tile of queries meets before the next one
/// does: they stay in the second-level cache meanwhile.
inline constexpr Index kChunkBytes = 1400 << 10;
/// Where the mask leaves tiles out, so many times the tiles: a tile of queries is packed for each
/// chunk that it sees, and only those that it sees need stay in the cache.
inline constexpr Index kSparseChunk = 8;

/// Rows of gradients that are asked for ahead: they lie apart, where no hardware looks ahead.
inline constexpr Index kRowsAhead = 6;

/// Floats of a row of dK or dV in here.
inline Index padded(Index dim, const Kernel& kernel) {
  return (dim + kernel.pad - 1) / kernel.pad * kernel.pad;
}

/// Tiles of keys of a chunk where the mask leaves none out. `packs` is bytes of a packed tile.
inline Index tiles_of_chunk(Index packs, Index d_qk, Index d_v, const Kernel& kernel) {
  const Index sums = kernel.backward_tile * (padded(d_qk, kernel) + padded(d_v, kernel)) * 4;
  return std::max<Index>(1, kChunkBytes / (packs + sums));
}

/// What one thread needs to take queries through keys backward.
template <class T>
class BackwardWorker {
 public:
  /// `most_tiles` of keys, at most, are at hand at a time; `packs` is memory for as many.
  BackwardWorker(const BackwardBlock<T>& block, Index most_tiles, std::byte* packs)
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
        rows_(lanes_ * block.q.dim),
        dk_(most_tiles_ * kernel_.backward_tile * dk_row_),
        dv_(most_tiles_ * kernel_.backward_tile * dv_row_),
        lse_(panels_ * lanes_),
        delta_(panels_ * lanes_),
        row_of_(static_cast<std::size_t>(panels_ * lanes_)),
        head_of_(row_of_.size()),
        slots_(most_tiles) {
    for (const auto& keys : block.taken) {
      rules_.emplace_back(static_cast<std::size_t>(panels_),
                          PanelRules(keys->rules, kernel_.lanes, kernel_.backward_tile));
    }
  }

  /// Floats that a kernel leaves for a tile of queries.
  Index numbers_of_tile() const { return panels_ * lanes_ * block_.q.dim; }
  Index tiles_of_queries(Index g) const {
    const Index size = panels_ * lanes_;
    const HeadGroup& group = block_.groups[static_cast<std::size_t>(g)];
    return (block_.q.rows * group.heads.size() + size - 1) / size;
  }

  /// Adds what the unit's keys give to dk, dv and, by rows, to `dq` times `factor`. Where `written`
  /// is given, dq is a copy of which only rows with a flag there hold numbers.
  void run(const Unit& unit, View<float> dq, float factor, View<char> written, Poller& poller) {
    for (const KeyPiece& piece : pieces_of(unit)) {
      for (Index g = unit.groups.begin; g < unit.groups.end; ++g) {
        chunk(
            g, {&piece, 1}, poller,
            [&](const KeyPiece&, Range lanes) { give_dq(lanes.size(), dq, factor, written); },
            [](Index) {});
      }
    }
  }

  /// The same of all parts of a cluster, in order, with scale * dQ added to the rows of the block
  /// as if each part had a copy of its own: what a tile of queries costs to pack is paid for as
  /// many keys as the cache holds, not for each part. `memory`: PartSums::floats.
  void run_all(const Cluster& groups, std::span<const Unit> parts, float* memory, Poller& poller) {
    std::vector<KeyPiece> pieces;
    for (const Unit& part : parts) {
      const std::vector<KeyPiece> own = pieces_of(part);
      pieces.insert(pieces.end(), own.begin(), own.end());
    }
    const Range all{pieces.front().tiles.begin, pieces.back().tiles.end};
    if (chunk_end({groups, all, 0, 0}, all.begin) == all.end) {
      // The sum of a tile of queries is done before the next one begins.
      for (Index g = groups.begin; g < groups.end; ++g) {
        PartSums sums(memory, 1, numbers_of_tile());
        chunk(
            g, pieces, poller,
            [&](const KeyPiece& piece, Range) { sums.add(0, piece.part, piece.whole, dq_.get()); },
            [&](Index tile) { give_sum(g, tile, sums.take(0)); });
      }
      return;
    }
    std::vector<PartSums> sums;
    for (Index g = groups.begin; g < groups.end; ++g) {
      const Index tiles = tiles_of_queries(g);
      sums.emplace_back(memory, tiles, numbers_of_tile());
      memory += PartSums::floats(tiles, numbers_of_tile());
    }
    for (std::size_t from = 0; from < pieces.size();) {
      const Index begin = pieces[from].tiles.begin;
      const Index most = chunk_end({groups, {begin, all.end}, 0, 0}, begin);
      std::size_t to = from + 1;
      while (to < pieces.size() && pieces[to].tiles.end <= most) ++to;
      for (Index g = groups.begin; g < groups.end; ++g) {
        PartSums& own = sums[static_cast<std::size_t>(g - groups.begin)];
        chunk(
            g, {pieces.data() + from, to - from}, poller,
            [&](const KeyPiece& piece, Range lanes) {
              own.add(lanes.begin / (panels_ * lanes_), piece.part, piece.whole, dq_.get());
            },
            [](Index) {});
      }
      from = to;
    }
    for (Index g = groups.begin; g < groups.end; ++g) {
      for (Index tile = 0; tile < tiles_of_queries(g); ++tile) {
        give_sum(g, tile, sums[static_cast<std::size_t>(g - groups.begin)].take(tile));
        poller.after(static_cast<double>(numbers_of_tile()));
      }
    }
  }

 private:
  /// Tiles of keys of one part that are taken together.
  struct KeyPiece {
    Range tiles;
    Index part;
    bool whole;  ///< all of the part
  };

  std::vector<KeyPiece> pieces_of(const Unit& unit) const {
    std::vector<KeyPiece> pieces;
    for (Index from = unit.tiles.begin; from < unit.tiles.end;) {
      const Range tiles{from, chunk_end(unit, from)};
      pieces.push_back({tiles, unit.part, tiles == unit.tiles});
      from = tiles.end;
    }
    return pieces;
  }

  /// Where the chunk that begins at tile `from` ends: some queries here and there see chunk_ tiles
  /// of it at most, and there is a slot for each tile while queries see it.
  Index chunk_end(const Unit& unit, Index from) const {
    constexpr Index kRows = 8;
    Index end = unit.tiles.end;
    if (end - from <= chunk_) return end;
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
      end = slots_end(g, {from, end});
    }
    return end;
  }

  /// The end of the first of these tiles that never have more open at once than there are slots.
  Index slots_end(Index g, Range tiles) const {
    if (tiles.size() <= most_tiles_) return tiles.end;
    const std::vector<SeenTile>& seen = block_.seen_by(g);
    const Index heads = block_.groups[static_cast<std::size_t>(g)].heads.size();
    const Index lanes = panels_ * lanes_;
    std::vector<Index> open(static_cast<std::size_t>(tiles_of_queries(g)));
    for (Index t = tiles.begin; t < tiles.end; ++t) {
      const Range rows = seen[static_cast<std::size_t>(t)].rows;
      if (rows.empty()) continue;
      const Index last = (rows.end * heads - 1) / lanes;
      for (Index i = rows.begin * heads / lanes; i <= last; ++i) {
        if (++open[static_cast<std::size_t>(i)] > most_tiles_) return t;
      }
    }
    return tiles.end;
  }

  /// Takes all queries through neighbouring pieces. give(piece, lanes) gets dq_ of each tile of
  /// queries that sees some of a piece, done(tile) comes behind the last one.
  template <class Give, class Done>
  void chunk(Index g, std::span<const KeyPiece> pieces, Poller& poller, const Give& give,
             const Done& done) {
    const HeadGroup& group = block_.groups[static_cast<std::size_t>(g)];
    const TakenKeys& keys = block_.keys_of(g);
    const Range tiles{pieces.front().tiles.begin, pieces.back().tiles.end};
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
    slots_.begin(tiles);
    const Index lanes = block_.q.rows * group.heads.size();
    const Index size = panels_ * lanes_;
    const Index end = seeing.end * group.heads.size();
    for (Index first = seeing.begin * group.heads.size() / size * size; first < end;
         first += size) {
      const Range now{first, std::min(first + size, lanes)};
      const Range rows{group.row(now.begin), group.row(now.end - 1) + 1};
      slots_.close_if(
          [&](Index t) { return seen[static_cast<std::size_t>(t)].rows.end <= rows.begin; },
          [&](Index t, Index slot) { give_dkv(g, t, slot); });
      lay_out(group, now);
      const UnitSteps& steps = steps_of(g, now, rows, tiles);
      if (steps.runs().empty()) continue;
      start(g);
      const Range next{rows.end, std::min(rows.end + rows.size(), seeing.end)};
      for (Index h = group.heads.begin; h < group.heads.end; ++h) {
        prefetch(block_.q, h, next);
        prefetch(block_.d_o, h, next);
      }
      auto piece = pieces.begin();
      bool found = false;  // something of the piece
      for (const UnitSteps::Run& run : steps.runs()) {
        for (Index t = run.tiles.begin; t < run.tiles.end; ++t) {
          if (t >= piece->tiles.end) {
            if (found) give(*piece, now);
            found = false;
            while (t >= piece->tiles.end) ++piece;
          }
          if (!found) std::fill_n(dq_.get(), numbers_of_tile(), 0.0f);
          found = true;
          step(g, steps, run, t, open(t));
          poller.after(static_cast<double>(now.size() * block_.tile(t).size()) *
                       static_cast<double>(6 * block_.q.dim + 4 * block_.v.dim));
        }
      }
      give(*piece, now);
      done(first / size);
    }
    slots_.close_if([](Index) { return true; }, [&](Index t, Index slot) { give_dkv(g, t, slot); });
  }

  /// The slot of a tile, whose gradients begin with zeros.
  Index open(Index t) {
    const auto [slot, is_new] = slots_.open(t);
    if (is_new) {
      const Index rows = kernel_.backward_tile;
      std::fill_n(dk_.get() + slot * rows * dk_row_, rows * dk_row_, 0.0f);
      std::fill_n(dv_.get() + slot * rows * dv_row_, rows * dv_row_, 0.0f);
    }
    return slot;
  }

  /// Rows and heads of the lanes.
  void lay_out(const HeadGroup& group, Range lanes) {
    used_ = (lanes.size() + lanes_ - 1) / lanes_;
    for (Index i = 0; i < panels_ * lanes_; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const bool used = lanes.begin + i < lanes.end;
      row_of_[at] = used ? group.row(lanes.begin + i) : -1;
      head_of_[at] = used ? group.head(lanes.begin + i) : -1;
    }
  }

  /// Groups of as many heads under the same mask take the same steps. Those of other tiles are
  /// forgotten: a thread does not come back to them.
  const UnitSteps& steps_of(Index g, Range lanes, Range rows, Range tiles) {
    if (std::exchange(tiles_known_, tiles) != tiles) known_.forget();
    const Index heads = block_.groups[static_cast<std::size_t>(g)].heads.size();
    const auto taken = static_cast<Index>(block_.taken_by[static_cast<std::size_t>(g)]);
    return known_.of({block_.mask.variant(block_.head(g)), heads, lanes.begin, taken}, [&] {
      return UnitSteps(
          LiveRows(block_.keys_of(g).where, block_.mask, block_.head(g), rows, block_.keys(tiles)),
          {row_of_.data(), static_cast<std::size_t>(used_ * lanes_)}, kernel_,
          kernel_.backward_tile, tiles, block_.k.rows);
    });
  }

  void start(Index g) {
    std::vector<const void*> q(row_of_.size());
    std::vector<const void*> d_o(row_of_.size());
    constexpr float kInf = std::numeric_limits<float>::infinity();
    for (Index i = 0; i < panels_ * lanes_; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const bool used = row_of_[at] >= 0;
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

  void step(Index g, const UnitSteps& steps, const UnitSteps::Run& run, Index t, Index slot) {
    const HeadGroup& group = block_.groups[static_cast<std::size_t>(g)];
    const Range tile = block_.tile(t);
    const Piece all{0, static_cast<int>(tile.size()), false};
    const auto used = static_cast<std::size_t>(used_);
    lists_.assign(used, &all);
    counts_.assign(used, run.count == 0 ? 1 : 0);
    allowed_.assign(used, {});
    for (std::size_t i = run.first; i < run.first + run.count; ++i) {
      const UnitSteps::Step one = steps.step(i);
      const auto p = static_cast<std::size_t>(one.panel);
      lists_[p] = one.pieces.data();
      counts_[p] = static_cast<int>(one.pieces.size());
      allowed_[p] = one.allowed;
    }
    score_rules_.clear();
    for (Index p = 0; p < used_; ++p) {
      rules_of(g, p).keys(tile, group.key_head);
      score_rules_.push_back(rules_of(g, p).rules());
    }
    kernel_.backward({.q = q_.get(),
                      .d_o = d_o_.get(),
                      .k = packs_.k(t, slot),
                      .v = packs_.v(t, slot),
                      .d_qk = block_.d_qk(),
                      .d_v = block_.d_v(),
                      .panels = static_cast<int>(used_),
                      .pieces = lists_.data(),
                      .piece_counts = counts_.data(),
                      .allowed = allowed_.data(),
                      .rules = score_rules_.data(),
                      .normalizer = block_.normalizer,
                      .scratch = scratch_.get(),
                      .lse = lse_.get(),
                      .delta = delta_.get(),
                      .dq = dq_.get(),
                      .dk = dk_.get() + slot * kernel_.backward_tile * dk_row_,
                      .dv = dv_.get() + slot * kernel_.backward_tile * dv_row_});
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

  /// Adds scale * sum, if there is one, to dQ of a tile of a group's queries; rounded as where
  /// copies are added up.
  void give_sum(Index g, Index tile, const float* sum) {
    if (sum == nullptr) return;
    const HeadGroup& group = block_.groups[static_cast<std::size_t>(g)];
    const Index lanes = block_.q.rows * group.heads.size();
    std::vector<float*> row(static_cast<std::size_t>(lanes_));
    for (Index i = 0; i < lanes_; ++i) {
      row[static_cast<std::size_t>(i)] = rows_.get() + i * block_.q.dim;
    }
    for (Index p = 0; p < panels_; ++p) {
      const Index first = (tile * panels_ + p) * lanes_;
      if (first >= lanes) break;
      const Index end = std::min(first + lanes_, lanes);
      for (Index lane = first; lane < end; ++lane) {
        prefetch(block_.dq.at(group.row(lane), group.head(lane)), block_.q.dim);
      }
      std::fill_n(rows_.get(), lanes_ * block_.q.dim, 0.0f);
      kernel_.add_panel(sum + p * lanes_ * block_.q.dim, block_.d_qk(), 1.0f, row.data());
      for (Index lane = first; lane < end; ++lane) {
        const float* from = row[static_cast<std::size_t>(lane - first)];
        float* to = block_.dq.at(group.row(lane), group.head(lane));
        for (Index i = 0; i < block_.q.dim; ++i) to[i] += block_.scale * from[i];
      }
    }
  }

  void give_dkv(Index g, Index t, Index slot) const {
    const HeadGroup& group = block_.groups[static_cast<std::size_t>(g)];
    const TakenKeys& taken = block_.keys_of(g);
    const Range keys = block_.tile(t);
    const float* dk = dk_.get() + slot * kernel_.backward_tile * dk_row_;
    const float* dv = dv_.get() + slot * kernel_.backward_tile * dv_row_;
    for (Index key = keys.begin; key < keys.end; ++key, dk += dk_row_, dv += dv_row_) {
      float* to_k = block_.dk.at(taken.row(key), group.key_head);
      float* to_v = block_.dv.at(taken.row(key), group.value_head);
      if (const Index ahead = key + kRowsAhead; ahead < keys.end) {
        prefetch(block_.dk.at(taken.row(ahead), group.key_head), block_.q.dim);
        prefetch(block_.dv.at(taken.row(ahead), group.value_head), block_.v.dim);
      }
      for (Index i = 0; i < block_.q.dim; ++i) to_k[i] += block_.scale * dk[i];
      for (Index i = 0; i < block_.v.dim; ++i) to_v[i] += dv[i];
    }
  }

  const BackwardBlock<T>& block_;
  const Kernel& kernel_;
  Index lanes_;
  Index panels_;
  Index dk_row_, dv_row_;
  Index chunk_;       ///< tiles of keys that stay in the cache
  Index most_tiles_;  ///< of keys at a time
  BackwardPacks<T> packs_;
  Buffer<std::byte> q_, d_o_;
  Buffer<std::byte> scratch_;
  Buffer<float> dq_, rows_, dk_, dv_;
  Buffer<float> lse_, delta_;
  Index used_ = 0;                       ///< panels of the tile of queries at hand
  std::vector<Index> row_of_, head_of_;  ///< of each lane; -1 where there is none
  KnownSteps known_;                     ///< of these tiles of keys, see steps_of
  Range tiles_known_;
  std::vector<std::vector<PanelRules>> rules_;  ///< by TakenKeys and panel
  TileSlots slots_;
  // Of the step at hand, by panel.
  std::vector<const Piece*> lists_;
  std::vector<int> counts_;
  std::vector<Lanes> allowed_;
  std::vector<ScoreRules> score_rules_;
};

}  // namespace dattn
