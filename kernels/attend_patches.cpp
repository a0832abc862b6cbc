// attend() of queries in patches.

#include <omp.h>

#include <algorithm>
#include <limits>

#include "kernels/forward_panel.hpp"
#include "kernels/patch_packs.hpp"

namespace dattn {
namespace {

/// Tiles of keys that a patch goes through at a time, at most: their bits are kept for all heads.
constexpr std::size_t kMostTiles = 24;

/// Units of work of a thread, where there are heads enough.
constexpr Index kUnitsOfThread = 8;

template <class T>
class PatchWorker {
 public:
  explicit PatchWorker(const PatchBlock<T>& block)
      : block_(block),
        kernel_(block.kernel),
        lanes_(kernel_.lanes),
        most_panels_((kPatchLanes + lanes_ - 1) / lanes_),
        q_bytes_(aligned(kernel_.q_size(block.d_qk()))),
        q_(most_panels_ * q_bytes_),
        o_(most_panels_ * lanes_ * block.v.dim),
        scratch_(aligned(kernel_.forward_scratch(block.d_qk(), block.d_v()))),
        rows_(kernel_.tile * std::max(block.q.dim, block.v.dim)),
        m_(static_cast<std::size_t>(most_panels_ * lanes_)),
        l_(m_.size()),
        row_of_(m_.size()),
        normalizer_(block.score.sigmoid ? Normalizer::sigmoid : Normalizer::softmax),
        begun_(static_cast<std::size_t>(most_panels_)),
        slot_of_(static_cast<std::size_t>(block.tiles()), kUnseen),
        bits_(static_cast<std::size_t>(most_panels_ * kernel_.tile) * kMostTiles),
        pieces_(static_cast<std::size_t>(most_panels_) * kMostTiles) {}

  /// Attends the query rows `rows`, in this order, of some groups to all that they see; `packs` are
  /// of the groups from `first` on.
  void run(std::span<const Index> rows, Range groups, PatchPacks<T>& packs, Index first,
           Poller& poller) {
    find_spans(rows);
    bool more = true;
    while (more) {
      more = find_pairs(rows);
      if (tiles_.empty()) break;
      note_positions(rows);
      const BlockRules rules(block_.score, here_, kernel_);
      for (Index g = groups.begin; g < groups.end; ++g) {
        attend_to(block_.groups[static_cast<std::size_t>(g)], rows, rules, packs, g - first,
                  poller);
      }
      done_.insert(done_.end(), tiles_.begin(), tiles_.end());
      for (const Index tile : tiles_) slot_of_[static_cast<std::size_t>(tile)] = kDone;
    }
    for (const Index tile : done_) slot_of_[static_cast<std::size_t>(tile)] = kUnseen;
    done_.clear();
  }

 private:
  static constexpr int kUnseen = -1;
  static constexpr int kDone = -2;

  void find_spans(std::span<const Index> rows) {
    spans_.clear();
    spans_of_.assign(1, 0);
    for (const Index row : rows) {
      block_.spans(block_.positions[static_cast<std::size_t>(row)], spans_, scratch_spans_);
      spans_of_.push_back(spans_.size());
    }
    panels_ = (std::ssize(rows) * block_.heads() + lanes_ - 1) / lanes_;
    for (Index lane = 0; lane < panels_ * lanes_; ++lane) {
      const Index i = lane / block_.heads();
      row_of_[static_cast<std::size_t>(lane)] =
          i < std::ssize(rows) ? rows[static_cast<std::size_t>(i)] : -1;
    }
  }

  /// Takes tiles that the rows see, as many as there may be at a time, their bits and pieces; true:
  /// there are more.
  bool find_pairs(std::span<const Index> rows) {
    bool more = false;
    tiles_.clear();
    const Index heads = block_.heads();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const Range lanes{static_cast<Index>(i) * heads, static_cast<Index>(i + 1) * heads};
      for (Index p = lanes.begin / lanes_; p * lanes_ < lanes.end; ++p) {
        const Range own = intersect(lanes, {p * lanes_, (p + 1) * lanes_});
        const unsigned ones = bits_of({own.begin - p * lanes_, own.end - p * lanes_});
        for (std::size_t j = spans_of_[i]; j < spans_of_[i + 1]; ++j) {
          const Range span = spans_[j];
          for (Index k = span.begin; k < span.end;) {
            const Place& place = block_.places[static_cast<std::size_t>(k)];
            const auto count = static_cast<int>(std::min<Index>(place.same, span.end - k));
            k += count;
            int& slot = slot_of_[static_cast<std::size_t>(place.tile)];
            if (slot == kUnseen && tiles_.size() < kMostTiles) {
              slot = static_cast<int>(tiles_.size());
              tiles_.push_back(place.tile);
              std::fill_n(words(0, slot), panels_ * kernel_.tile, 0u);
            }
            more = more || slot == kUnseen;
            if (slot < 0) continue;
            unsigned* word = words(p, slot) + place.at;
            for (int n = 0; n < count; ++n) word[n] |= ones;
          }
        }
      }
    }
    for (Index p = 0; p < panels_; ++p) {
      for (Index slot = 0; slot < std::ssize(tiles_); ++slot) find_pieces(p, slot);
    }
    return more;
  }

  static unsigned bits_of(Range lanes) {
    return static_cast<unsigned>(((std::uint64_t{1} << lanes.size()) - 1) << lanes.begin);
  }

  unsigned* words(Index p, Index slot) {
    return bits_.data() + (slot * panels_ + p) * kernel_.tile;
  }
  std::vector<Piece>& pieces(Index p, Index slot) {
    return pieces_[static_cast<std::size_t>(p) * kMostTiles + static_cast<std::size_t>(slot)];
  }
  Range tile(Index slot) const { return block_.tile(tiles_[static_cast<std::size_t>(slot)]); }

  /// Positions and weights of what is at hand, for score rules that ask for them.
  void note_positions(std::span<const Index> rows) {
    here_ = {block_.where.shape,
             block_.where.query_heads,
             block_.where.key_heads,
             block_.where.value_heads,
             {},
             {},
             {}};
    const Score& score = block_.score;
    const View<const float>& from = block_.where.key_weights;
    const bool places = !score.alibi.empty() || !score.bias.empty();
    weights_.clear();
    Index keys = 0;
    for (const Index t : tiles_) {
      const Range tile = block_.tile(t);
      keys += tile.size();
      for (Index i = tile.begin; i < tile.end && (places || from.data != nullptr); ++i) {
        const Index row = block_.keys.rows[static_cast<std::size_t>(i)];
        if (places) add(here_.keys, part(block_.where.keys, {row, row + 1}).front().first);
        for (Index h = 0; h < from.heads; ++h) weights_.push_back(*from.at(row, h));
      }
    }
    if (from.data != nullptr) here_.key_weights = {weights_.data(), keys, from.heads, 1};
    if (!places) return;
    for (const Index row : rows) {
      add(here_.queries, block_.positions[static_cast<std::size_t>(row)]);
    }
  }

  static void add(Runs& runs, Index position) {
    if (!runs.empty() && runs.back().bounds().end == position) {
      ++runs.back().count;
    } else {
      runs.push_back({position, 1, 1});
    }
  }

  /// Live pieces of a panel and a tile, from the bits of its keys: as LiveRows::pieces has them.
  void find_pieces(Index p, Index slot) {
    std::vector<Piece>& out = pieces(p, slot);
    out.clear();
    const unsigned* word = words(p, slot);
    const Index used = std::min(lanes_, lanes_used() - p * lanes_);
    const Index lanes_of_part = lanes_ / kernel_.parts;
    const auto count = static_cast<int>(tile(slot).size());
    std::array<unsigned, 2> part{};
    std::size_t parts = 0;
    for (Index first = 0; first < used; first += lanes_of_part) {
      part[parts++] = bits_of({first, std::min(first + lanes_of_part, used)});
    }
    const unsigned everywhere = (1u << parts) - 1;
    for (int first = 0; first < count; first += kernel_.granule) {
      const int size = std::min(kernel_.granule, count - first);
      unsigned some = 0;
      unsigned all = ~0u;
      for (int j = first; j < first + size; ++j) {
        some |= word[j];
        all &= word[j];
      }
      if (some == 0) continue;
      unsigned live = 0;
      bool masked = false;
      for (std::size_t i = 0; i < parts; ++i) {
        if ((some & part[i]) == 0) continue;
        live |= 1u << i;
        masked = masked || (all & part[i]) != part[i];
      }
      if (live == everywhere) live = Piece::kAll;
      if (!out.empty() && out.back().masked == masked && out.back().live == live &&
          out.back().first + out.back().count == first) {
        out.back().count += size;
      } else {
        out.push_back({first, size, masked, live});
      }
    }
  }

  Index lanes_used() const { return (std::ssize(spans_of_) - 1) * block_.heads(); }

  void attend_to(const HeadGroup& group, std::span<const Index> rows, const BlockRules& rules,
                 PatchPacks<T>& packs, Index place, Poller& poller) {
    start(group, rules);
    Index before = 0;  // keys at hand before the tile
    for (Index slot = 0; slot < std::ssize(tiles_); ++slot) {
      const Index t = tiles_[static_cast<std::size_t>(slot)];
      const Index keys = tile(slot).size();
      const auto pack = packs.need(group, place, t, rows_.get());
      for (Index p = 0; p < panels_; ++p) {
        if (pieces(p, slot).empty()) continue;
        step(group, p, slot, {before, before + keys}, pack);
        poller.after(static_cast<double>(lanes_ * keys * 2) *
                     static_cast<double>(block_.q.dim + block_.v.dim));
      }
      before += keys;
    }
    finish(group, rows);
  }

  void start(const HeadGroup& group, const BlockRules& rules) {
    std::fill(begun_.begin(), begun_.end(), false);
    std::fill(m_.begin(), m_.end(), -std::numeric_limits<float>::infinity());
    std::fill(l_.begin(), l_.end(), 0.0);
    rules_.clear();
    std::vector<const void*> row(static_cast<std::size_t>(lanes_));
    std::vector<Index> local(row.size());
    std::vector<Index> head(row.size());
    for (Index lane = 0; lane < panels_ * lanes_; ++lane) {
      const Index query = row_of_[static_cast<std::size_t>(lane)];
      if (query >= 0) prefetch(block_.q.at(query, group.head(lane)), block_.q.dim);
    }
    for (Index p = 0; p < panels_; ++p) {
      for (Index i = 0; i < lanes_; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const Index lane = p * lanes_ + i;
        const Index query = row_of_[static_cast<std::size_t>(lane)];
        row[at] = query < 0 ? nullptr : block_.q.at(query, group.head(lane));
        local[at] = query < 0 ? -1 : group.row(lane);
        head[at] = group.head(lane);
        if (query < 0) continue;
        prefetch(block_.out.at(query, head[at]), block_.out.dim);  // finish() reads and writes it
      }
      kernel_.pack_q(row.data(), element_of<T>(), block_.d_qk(), rules.factor(),
                     q_.get() + p * q_bytes_);
      rules_.emplace_back(rules, kernel_.lanes, kernel_.tile).lanes(local, head);
    }
  }

  /// `keys` are those of the tile among the keys at hand.
  void step(const HeadGroup& group, Index p, Index slot, Range keys,
            const typename PatchPacks<T>::Tile& pack) {
    const std::vector<Piece>& found = pieces(p, slot);
    const bool masked =
        std::any_of(found.begin(), found.end(), [](const Piece& x) { return x.masked; });
    PanelRules& rules = rules_[static_cast<std::size_t>(p)];
    rules.keys(keys, group.key_head);
    const unsigned* word = words(p, slot);
    const ForwardStep s{.q = q_.get() + p * q_bytes_,
                        .k = pack.k,
                        .v = pack.v,
                        .d_qk = block_.d_qk(),
                        .d_v = block_.d_v(),
                        .pieces = found.data(),
                        .piece_count = static_cast<int>(found.size()),
                        .allowed = masked ? Lanes{nullptr, nullptr, word} : Lanes{},
                        .rules = rules.rules(),
                        .normalizer = normalizer_,
                        .scratch = scratch_.get(),
                        .m = m_.data() + p * lanes_,
                        .l = l_.data() + p * lanes_,
                        .o = o_.get() + p * lanes_ * block_.v.dim,
                        .first = !begun_[static_cast<std::size_t>(p)]};
    begun_[static_cast<std::size_t>(p)] = true;
    if (!masked || pack.finite) return kernel_.forward(s);
    const Index* row = block_.keys.rows.data() + tile(slot).begin;
    forward_apart<T>(
        kernel_, s, {row_of_.data() + p * lanes_, static_cast<std::size_t>(lanes_)}, keys.size(),
        [&](std::size_t lane, std::vector<unsigned>& sees) {
          for (std::size_t j = 0; j < sees.size(); ++j) sees[j] = word[j] >> lane & 1u;
        },
        [&](Index key) { return block_.v.at(row[key], group.value_head); });
  }

  void finish(const HeadGroup& group, std::span<const Index> rows) {
    std::vector<float*> records(static_cast<std::size_t>(lanes_));
    for (Index p = 0; p < panels_; ++p) {
      if (!begun_[static_cast<std::size_t>(p)]) continue;
      for (Index i = 0; i < lanes_; ++i) {
        const Index lane = p * lanes_ + i;
        records[static_cast<std::size_t>(i)] =
            group.row(lane) < std::ssize(rows)
                ? block_.out.at(row_of_[static_cast<std::size_t>(lane)], group.head(lane))
                : nullptr;
      }
      merge_panel(kernel_, m_.data() + p * lanes_, l_.data() + p * lanes_,
                  o_.get() + p * lanes_ * block_.v.dim, block_.v.dim, records);
    }
  }

  const PatchBlock<T>& block_;
  const Kernel& kernel_;
  Index lanes_;
  Index most_panels_;
  Index panels_ = 0;
  Index q_bytes_;
  Buffer<std::byte> q_;
  Buffer<float> o_;
  Buffer<std::byte> scratch_;
  Buffer<T> rows_;  ///< of a tile
  std::vector<float> m_;
  std::vector<double> l_;
  std::vector<Index> row_of_;  ///< of each lane, in the block; -1 where there is none
  Normalizer normalizer_;
  std::vector<bool> begun_;  ///< the panels that have something in o_
  std::vector<Range> spans_, scratch_spans_;
  std::vector<std::size_t> spans_of_;       ///< where those of each row begin
  std::vector<Index> tiles_, done_;         ///< at hand, each in a slot; those before
  std::vector<int> slot_of_;                ///< of each tile
  std::vector<unsigned> bits_;              ///< [slots][panels][tile] lanes that see the key
  std::vector<std::vector<Piece>> pieces_;  ///< [panels][slots]
  Where here_;                              ///< rows and keys at hand
  std::vector<float> weights_;
  std::vector<PanelRules> rules_;
};

std::vector<Index> positions_of(const Runs& runs) {
  std::vector<Index> positions;
  positions.reserve(static_cast<std::size_t>(size(runs)));
  for (const Run& run : runs) {
    for (Index i = 0; i < run.count; ++i) positions.push_back(run.at(i));
  }
  return positions;
}

/// Strips in even parts of so many rows, at most.
std::vector<Range> patches_of(const StripOrder& order, Index most_rows) {
  std::vector<Range> patches;
  Index begin = 0;
  for (const Index end : order.ends) {
    const Index parts = (end - begin + most_rows - 1) / most_rows;
    for (Index i = 0; i < parts; ++i) {
      const Range part = even_part(end - begin, parts, i);
      patches.push_back({begin + part.begin, begin + part.end});
    }
    begin = std::max(begin, end);
  }
  return patches;
}

}  // namespace

template <class T>
void attend_patches(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                    const Where& where, const Mask& mask, const Work& work, const Patches& patches,
                    const std::vector<HeadGroup>& groups) {
  PatchBlock<T> block{q,
                      k,
                      v,
                      out,
                      where,
                      mask,
                      work.score,
                      kernel_of<T>(work),
                      groups,
                      order_of_queries(where.queries, patches),
                      order_of_keys(where.keys, patches),
                      positions_of(where.queries)};
  find_places(block);
  const std::vector<Range> units = patches_of(block.queries, kPatchLanes / block.heads());
  const Index count = std::ssize(units);
  const Index bytes_of_group = block.tiles() * (block.k_bytes() + block.v_bytes());
  const Index wave = std::clamp<Index>(kPackBytes / bytes_of_group, 1, std::ssize(groups));
  CallWorkspace workspace(work);
  Caught caught;
  for (Index begin = 0; begin < std::ssize(groups); begin += wave) {
    const Range now{begin, std::min(begin + wave, std::ssize(groups))};
    PatchPacks<T> packs(block, now.size(), workspace);
    // No sum depends on how heads are shared out.
    const Index parts = std::clamp<Index>((work.threads * kUnitsOfThread + count - 1) / count, 1,
                                          work.threads == 1 ? 1 : now.size());
#pragma omp parallel num_threads(work.threads)
    {
      const Entered entered(block.kernel);
      Poller poller(work.poll, caught, omp_get_thread_num() == 0);
      PatchWorker<T> worker(block);
#pragma omp for schedule(dynamic)
      for (Index i = 0; i < count * parts; ++i) {
        const Range rows = units[static_cast<std::size_t>(i / parts)];
        const Range part = even_part(now.size(), parts, i % parts);
        worker.run({block.queries.rows.data() + rows.begin, static_cast<std::size_t>(rows.size())},
                   {begin + part.begin, begin + part.end}, packs, begin, poller);
      }
    }
  }
  caught.rethrow();
}

template void attend_patches(View<const float>, View<const float>, View<const float>, View<float>,
                             const Where&, const Mask&, const Work&, const Patches&,
                             const std::vector<HeadGroup>&);
template void attend_patches(View<const BFloat16>, View<const BFloat16>, View<const BFloat16>,
                             View<float>, const Where&, const Mask&, const Work&, const Patches&,
                             const std::vector<HeadGroup>&);

Index attend_patches_bytes(const Shape& shape, Index queries, Index keys, int threads,
                           const Kernel& kernel) {
  const auto d_qk = static_cast<int>(shape.d_qk);
  const auto d_v = static_cast<int>(shape.d_v);
  const Index lanes = kPatchLanes + kernel.lanes;
  const Index words = lanes / kernel.lanes * static_cast<Index>(kMostTiles) * kernel.tile;
  const Index pieces = words / kernel.granule * static_cast<Index>(sizeof(Piece));
  const Index tiles = (keys + kernel.tile - 1) / kernel.tile;
  const Index worker =
      lanes * (shape.d_qk + shape.d_v + 8) * 4 + aligned(kernel.forward_scratch(d_qk, d_v)) +
      kernel.tile * std::max(shape.d_qk, shape.d_v) * 4 + words * 4 + 2 * pieces + tiles * 13;
  return queries * 16 + keys * 20 + shape.query_heads * tiles * 8 + threads * worker;
}

}  // namespace dattn
