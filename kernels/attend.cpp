#include <omp.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <memory>
#include <optional>

#include "kernels/attend_block.hpp"
#include "kernels/attend_units.hpp"
#include "kernels/check.hpp"
#include "kernels/decode.hpp"
#include "kernels/forward_panel.hpp"
#include "kernels/packs.hpp"
#include "kernels/panel.hpp"
#include "kernels/partial.hpp"
#include "kernels/patches.hpp"
#include "kernels/readers.hpp"
#include "kernels/unit_steps.hpp"

namespace dattn {
namespace {

/// What one thread needs to take a tile of queries through keys.
template <class T>
class Worker {
 public:
  explicit Worker(const ForwardBlock<T>& block)
      : block_(block),
        kernel_(block.kernel),
        lanes_(kernel_.lanes),
        most_panels_((kLanes + lanes_ - 1) / lanes_),
        q_bytes_(aligned(kernel_.q_size(static_cast<int>(block.q.dim)))),
        q_(most_panels_ * q_bytes_),
        o_(most_panels_ * lanes_ * block.v.dim),
        scratch_(aligned(
            kernel_.forward_scratch(static_cast<int>(block.q.dim), static_cast<int>(block.v.dim)))),
        k_pack_(block.k_bytes()),
        v_pack_(block.v_bytes()),
        m_(static_cast<std::size_t>(most_panels_ * lanes_)),
        l_(m_.size()),
        row_of_(m_.size()),
        head_of_(m_.size()),
        begun_(static_cast<std::size_t>(most_panels_)),
        rules_(begun_.size(), PanelRules(block.rules, kernel_.lanes, kernel_.tile)) {}

  /// Attends the unit's queries to its keys and merges what it finds into `out`.
  void run(const ForwardUnit& unit, Packs<T>* packs, Index packed_head, View<float> out,
           Poller& poller) {
    const HeadGroup& group = block_.groups[static_cast<std::size_t>(unit.group)];
    const Range rows{group.row(unit.lanes.begin), group.row(unit.lanes.end - 1) + 1};
    for (Index h = group.heads.begin; h < group.heads.end; ++h) prefetch(block_.q, h, rows);
    lay_out(group, unit.lanes);
    const UnitSteps& steps = steps_of(group, unit, rows);
    if (steps.runs().empty()) return;
    start(out);
    const Index last = steps.runs().back().tiles.end;
    for (const UnitSteps::Run& run : steps.runs()) {
      for (Index t = run.tiles.begin; t < run.tiles.end; ++t) {
        const Range tile = block_.tile(t);
        const PackedTile pack = packs != nullptr ? packs->need(group, packed_head, t, last, poller)
                                                 : own_pack(group, t);
        const auto take = [&](const UnitSteps::Step& step, bool strange) {
          attend_panel(group, step, tile, pack, strange);
          if (pack.k_row != 0) ask_ahead(group, t + 1, step.panel);
          poller.after(static_cast<double>(lanes_ * tile.size() * 2) *
                       static_cast<double>(block_.q.dim + block_.v.dim));
        };
        const Piece all{0, static_cast<int>(tile.size()), false};
        for (Index p = 0; p < panels_ && run.count == 0; ++p) {
          take({p, {&all, 1}, {}, false}, false);
        }
        for (std::size_t i = run.first; i < run.first + run.count; ++i) {
          const UnitSteps::Step step = steps.step(i);
          take(step,
               step.masked && (packs != nullptr ? packs->strange(group, packed_head, t)
                                                : !all_finite(block_.v, group.value_head, tile)));
        }
      }
    }
    finish(out);
  }

 private:
  /// A tile that nobody else reads. Keys that lie side by side are not packed for that.
  PackedTile own_pack(const HeadGroup& group, Index t) {
    const Range tile = block_.tile(t);
    const bool lying = kernel_.lying_keys != 0 && block_.k.dim % kernel_.lying_keys == 0 &&
                       block_.k.row_stride() == block_.k.dim && tile.size() % kernel_.granule == 0;
    if (!lying) {
      block_.pack(group, t, k_pack_.get(), v_pack_.get());
      return {k_pack_.get(), v_pack_.get()};
    }
    kernel_.pack_v(rows_of(block_.v, group.value_head, tile), v_pack_.get());
    return {reinterpret_cast<const std::byte*>(block_.k.at(tile.begin, group.key_head)),
            v_pack_.get(), block_.k.row_stride() * static_cast<long>(sizeof(T))};
  }

  /// Asks for the p-th part of a tile that is read as it lies, between panels: at once it would be
  /// too much under way.
  void ask_ahead(const HeadGroup& group, Index t, Index p) const {
    if (t >= block_.tiles) return;
    const Range tile = block_.tile(t);
    const Range some = even_part(tile.size(), panels_, p);
    const Range rows{tile.begin + some.begin, tile.begin + some.end};
    prefetch(block_.k, group.key_head, rows);
    if (block_.v.at(0, group.value_head) != block_.k.at(0, group.key_head)) {
      prefetch(block_.v, group.value_head, rows);
    }
  }

  /// Groups of as many heads under the same mask take the same steps.
  const UnitSteps& steps_of(const HeadGroup& group, const ForwardUnit& unit, Range rows) {
    const Index head = block_.where.query_heads.begin + group.heads.begin;
    const KnownSteps::Unit which{block_.mask.variant(head), group.heads.size(),
                                 unit.lanes.begin,          unit.lanes.end,
                                 unit.tiles.begin,          unit.tiles.end};
    return known_.of(which, [&] {
      return UnitSteps(LiveRows(block_.where, block_.mask, head, rows),
                       {row_of_.data(), static_cast<std::size_t>(panels_ * lanes_)}, kernel_,
                       kernel_.tile, unit.tiles, block_.k.rows);
    });
  }

  std::span<const Index> rows_of_panel(Index p) const {
    return {row_of_.data() + p * lanes_, static_cast<std::size_t>(lanes_)};
  }
  std::span<const Index> heads_of_panel(Index p) const {
    return {head_of_.data() + p * lanes_, static_cast<std::size_t>(lanes_)};
  }
  /// Rows and heads of the lanes, panel by panel.
  void lay_out(const HeadGroup& group, Range lanes) {
    panels_ = (lanes.size() + lanes_ - 1) / lanes_;
    Index row = group.row(lanes.begin);
    Index head = group.head(lanes.begin);
    for (Index i = 0; i < panels_ * lanes_; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const bool used = i < lanes.size();
      row_of_[at] = used ? row : -1;
      head_of_[at] = used ? head : -1;
      if (++head == group.heads.end) {
        head = group.heads.begin;
        ++row;
      }
    }
  }

  void start(View<float> out) {
    std::fill(begun_.begin(), begun_.end(), false);
    std::fill(m_.begin(), m_.end(), -std::numeric_limits<float>::infinity());
    std::fill(l_.begin(), l_.end(), 0.0);
    std::vector<const void*> row(static_cast<std::size_t>(lanes_));
    for (Index p = 0; p < panels_; ++p) {
      for (Index i = 0; i < lanes_; ++i) {
        const auto at = static_cast<std::size_t>(p * lanes_ + i);
        const bool used = row_of_[at] >= 0;
        row[static_cast<std::size_t>(i)] = used ? block_.q.at(row_of_[at], head_of_[at]) : nullptr;
        if (used) prefetch(out.at(row_of_[at], head_of_[at]), out.dim);  // finish() merges into it
      }
      kernel_.pack_q(row.data(), element_of<T>(), static_cast<int>(block_.q.dim),
                     block_.rules.factor(), q_.get() + p * q_bytes_);
      rules_[static_cast<std::size_t>(p)].lanes(rows_of_panel(p), heads_of_panel(p));
    }
  }

  void attend_panel(const HeadGroup& group, const UnitSteps::Step& step, Range tile,
                    const PackedTile& pack, bool strange) {
    const Index p = step.panel;
    PanelRules& rules = rules_[static_cast<std::size_t>(p)];
    rules.keys(tile, group.key_head);
    const auto first = static_cast<std::size_t>(p * lanes_);
    ForwardStep s{.q = q_.get() + p * q_bytes_,
                  .k = pack.k,
                  .v = pack.v,
                  .d_qk = static_cast<int>(block_.q.dim),
                  .d_v = static_cast<int>(block_.v.dim),
                  .pieces = step.pieces.data(),
                  .piece_count = static_cast<int>(step.pieces.size()),
                  .allowed = step.allowed,
                  .rules = rules.rules(),
                  .normalizer = block_.rules.normalizer(),
                  .scratch = scratch_.get(),
                  .m = m_.data() + first,
                  .l = l_.data() + first,
                  .o = o_.get() + p * lanes_ * block_.v.dim,
                  .first = !begun_[static_cast<std::size_t>(p)],
                  .k_row = pack.k_row};
    begun_[static_cast<std::size_t>(p)] = true;
    if (strange) {
      forward_apart<T>(
          kernel_, s, rows_of_panel(p), tile.size(),
          [&](std::size_t lane, std::vector<unsigned>& sees) {
            mark_allowed(step.allowed, lane, sees);
          },
          [&](Index key) { return block_.v.at(tile.begin + key, group.value_head); });
    } else {
      kernel_.forward(s);
    }
  }

  /// Merges what was found into the records of these lanes.
  void finish(View<float> out) const {
    std::vector<float*> records(static_cast<std::size_t>(lanes_));
    for (Index p = 0; p < panels_; ++p) {
      for (Index i = 0; i < lanes_; ++i) {
        const auto at = static_cast<std::size_t>(p * lanes_ + i);
        records[static_cast<std::size_t>(i)] =
            row_of_[at] >= 0 ? out.at(row_of_[at], head_of_[at]) : nullptr;
      }
      merge_panel(kernel_, m_.data() + p * lanes_, l_.data() + p * lanes_,
                  o_.get() + p * lanes_ * block_.v.dim, block_.v.dim, records);
    }
  }

  const ForwardBlock<T>& block_;
  const Kernel& kernel_;
  Index lanes_;
  Index most_panels_;
  Index panels_ = 0;
  Index q_bytes_;
  Buffer<std::byte> q_;
  Buffer<float> o_;
  Buffer<std::byte> scratch_;
  Buffer<std::byte> k_pack_, v_pack_;
  std::vector<float> m_;
  std::vector<double> l_;
  std::vector<Index> row_of_, head_of_;  ///< of each lane; -1 where there is none
  std::vector<bool> begun_;              ///< the panels that have something in o_
  std::vector<PanelRules> rules_;
  KnownSteps known_;  ///< see steps_of
};

}  // namespace

template <class T>
void attend_block(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                  const Where& where, const Mask& mask, const Work& work) {
  const Kernel& kernel = kernel_of<T>(work);
  ForwardBlock<T> block{q,
                        k,
                        v,
                        where,
                        mask,
                        kernel,
                        BlockRules(work.score, where, kernel),
                        head_groups(where, mask),
                        (k.rows + kernel.tile - 1) / kernel.tile};
  Index most_lanes = 0;
  for (const HeadGroup& group : block.groups) {
    most_lanes = std::max(most_lanes, q.rows * group.heads.size());
  }
  if (most_lanes <= kDecodeLanes) {
    decode(q, k, v, out, where, mask, work, block.groups);
    return;
  }
  const std::vector<Range> tiles_of_part = tiles_of_parts(block);
  const Index parts = std::ssize(tiles_of_part);
  if (parts == 0) return;
  // With one tile of queries a pack would be read once: each unit then packs for itself.
  const bool shared = most_lanes > kLanes;

  Caught caught;
  const auto groups = static_cast<Index>(block.groups.size());
  const PackPlaces places =
      shared ? pack_places(block, work.threads) : PackPlaces{groups, block.tiles};
  std::optional<Packs<T>> packs;
  CallWorkspace workspace(work);
  if (shared) packs.emplace(block, places.heads, places.tiles, workspace);
  // The first part of the keys goes to `out`, the others have records of their own, merged in
  // order.
  const Index records = q.rows * q.heads;
  const Index others = parts - 1;
  auto* found = others > 0
                    ? workspace.take<float>(Workspace::Use::partials, others * records * out.dim)
                    : nullptr;
  const auto part_view = [&](Index part) {
    if (part == 0) return out;
    return View<float>{found + (part - 1) * records * out.dim, q.rows, q.heads, out.dim};
  };
  if (others > 0) start(View<float>{found, others * q.rows, q.heads, out.dim}, work.threads);

  std::vector<std::unique_ptr<Worker<T>>> workers(static_cast<std::size_t>(work.threads));
  for (Index begin = 0; begin < groups;) {
    Range now{begin, begin};
    // Groups of one key head and one value head (their masks differ) share a pack.
    std::vector<Index> pack_of;
    Index heads = 0;
    for (; now.end < groups; ++now.end) {
      const HeadGroup& group = block.groups[static_cast<std::size_t>(now.end)];
      const auto before = [&] { return block.groups[static_cast<std::size_t>(now.end - 1)]; };
      const bool same = now.end > begin && before().key_head == group.key_head &&
                        before().value_head == group.value_head;
      if (!same && heads == places.heads) break;
      if (!same) ++heads;
      pack_of.push_back(heads - 1);
    }
    begin = now.end;
    const std::vector<ForwardUnit> units = units_of(block, now, tiles_of_part, work.threads);
    if (shared) packs->forget();
#pragma omp parallel num_threads(work.threads)
    {
      const Entered entered(kernel);
      Poller poller(work.poll, caught, omp_get_thread_num() == 0);
      auto& worker = workers[static_cast<std::size_t>(omp_get_thread_num())];
      if (worker == nullptr) worker = std::make_unique<Worker<T>>(block);
#pragma omp for schedule(dynamic)
      for (std::size_t i = 0; i < units.size(); ++i) {
        const ForwardUnit& unit = units[i];
        worker->run(unit, shared ? &*packs : nullptr,
                    pack_of[static_cast<std::size_t>(unit.group - now.begin)], part_view(unit.part),
                    poller);
      }
    }
  }
  if (others > 0) {
#pragma omp parallel num_threads(work.threads)
    {
      Poller poller(work.poll, caught, omp_get_thread_num() == 0);
#pragma omp for
      for (Index row = 0; row < q.rows; ++row) {
        for (Index part = 1; part < parts; ++part) {
          for (Index h = 0; h < q.heads; ++h) {
            merge<float>(part_view(part).at(row, h), out.at(row, h), 1, out.dim);
          }
        }
        poller.after(static_cast<double>(others * q.heads * out.dim));
      }
    }
  }
  caught.rethrow();
}

template void attend_block(View<const float>, View<const float>, View<const float>, View<float>,
                           const Where&, const Mask&, const Work&);
template void attend_block(View<const BFloat16>, View<const BFloat16>, View<const BFloat16>,
                           View<float>, const Where&, const Mask&, const Work&);

Index attend_bytes(const Shape& shape, Index queries, Index query_heads, Index keys, int threads,
                   const Kernel& kernel) {
  const auto d_qk = static_cast<int>(shape.d_qk);
  const auto d_v = static_cast<int>(shape.d_v);
  const Index tile_bytes = aligned(kernel.k_size(d_qk)) + aligned(kernel.v_size(d_v));
  const Index head_bytes = (keys + kernel.tile - 1) / kernel.tile * tile_bytes;
  const Index packs = std::min(query_heads * head_bytes,
                               std::max(threads > 1 ? kPackBytes : kCachedPackBytes, head_bytes));
  // kForwardUnits parts of all records where they fit a tile of lanes (decode: kDecodeLanes of each
  // head), and never more than kForwardUnits tiles of lanes beyond those that there are.
  const Index records = queries * query_heads;
  const Index partials =
      std::min(kForwardUnits * records,
               std::max(2 * kForwardUnits * kLanes, kForwardUnits * kDecodeLanes * query_heads));
  const Index lanes = kLanes + kernel.lanes;
  const Index worker = lanes * (shape.d_qk + shape.d_v) * 4 + tile_bytes +
                       aligned(kernel.forward_scratch(d_qk, d_v)) + KnownSteps::kBytes;
  // What few queries see, each thread for itself.
  const Index key_heads = std::max(shape.key_heads, shape.value_heads);
  const Index few = queries > kMostRowsByReaders
                        ? 0
                        : kForwardUnits * kDecodeLanes * std::min(query_heads, key_heads);
  const Index ordered = keys * (shape.d_qk + shape.d_v + 1) * 4 + 128;  // of one head
  // Of what threads have, that of queries in patches or of the others, not both.
  const Index patches = attend_patches_bytes(shape, queries, keys, threads, kernel);
  return packs + ordered + (partials + threads * few) * record_length(shape.d_v) * 4 +
         std::max(threads * worker, patches);
}

}  // namespace dattn
