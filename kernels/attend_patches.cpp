// attend() of queries in patches.

#include <omp.h>

#include <limits>

#include "kernels/forward_panel.hpp"
#include "kernels/packs.hpp"
#include "kernels/patches.hpp"

namespace dattn {
namespace {

/// Keys that a patch is taken through at a time, at most: their bits are kept for all heads.
constexpr Index kMostKeys = 4096;

/// Units of work, where there are heads enough: what many threads need.
constexpr Index kLeastUnits = 64;

Index tiles_at_a_time(const Kernel& kernel) { return std::max<Index>(1, kMostKeys / kernel.tile); }

/// One call: everything that is the same for all threads.
template <class T>
struct PatchBlock {
  View<const T> q, k, v;
  View<float> out;
  const Where& where;
  const Mask& mask;
  const Score& score;
  const Kernel& kernel;
  const std::vector<HeadGroup>& groups;
  std::vector<Index> positions;  ///< of the rows of Q

  Index head() const { return where.query_heads.begin + groups.front().heads.begin; }
  Index heads() const { return groups.front().heads.size(); }
  int d_qk() const { return static_cast<int>(q.dim); }
  int d_v() const { return static_cast<int>(v.dim); }

  /// Appends the key rows that the query at a position sees.
  void spans(Index position, std::vector<Range>& found, std::vector<Range>& scratch) const {
    const std::size_t begin = found.size();
    Index before = 0;
    for (const Run& run : where.keys) {
      scratch.clear();
      if (run.step == 1) {
        mask.spans(head(), position, run.bounds(), scratch);
        for (const Range s : scratch) {
          append(found, begin, {before + s.begin - run.first, before + s.end - run.first});
        }
      } else {
        mask.members(head(), position, run, scratch);
        for (const Range s : scratch) append(found, begin, {before + s.begin, before + s.end});
      }
      before += run.count;
    }
  }
};

template <class T>
class PatchWorker {
 public:
  explicit PatchWorker(const PatchBlock<T>& block)
      : block_(block),
        kernel_(block.kernel),
        lanes_(kernel_.lanes),
        most_panels_((kPatchLanes + lanes_ - 1) / lanes_),
        most_tiles_(tiles_at_a_time(kernel_)),
        q_bytes_(aligned(kernel_.q_size(block.d_qk()))),
        q_(most_panels_ * q_bytes_),
        o_(most_panels_ * lanes_ * block.v.dim),
        scratch_(aligned(kernel_.forward_scratch(block.d_qk(), block.d_v()))),
        k_pack_(aligned(kernel_.k_size(block.d_qk()))),
        v_pack_(aligned(kernel_.v_size(block.d_v()))),
        k_rows_(kernel_.tile * block.q.dim),
        v_rows_(kernel_.tile * block.v.dim),
        m_(static_cast<std::size_t>(most_panels_ * lanes_)),
        l_(m_.size()),
        row_of_(m_.size()),
        normalizer_(block.score.sigmoid ? Normalizer::sigmoid : Normalizer::softmax),
        begun_(static_cast<std::size_t>(most_panels_)),
        pieces_(static_cast<std::size_t>(most_panels_ * most_tiles_)) {}

  /// Attends the query rows `rows`, in this order, of some groups to all that they see.
  void run(std::span<const Index> rows, Range groups, Poller& poller) {
    find_keys(rows);
    if (places_.size() == 0) return;
    for (Index begin = 0; begin < places_.size(); begin += most_tiles_ * kernel_.tile) {
      const Range keys{begin, std::min(begin + most_tiles_ * kernel_.tile, places_.size())};
      take(rows, keys);
      const BlockRules rules(block_.score, here_, kernel_);
      for (Index g = groups.begin; g < groups.end; ++g) {
        attend_to(block_.groups[static_cast<std::size_t>(g)], rows, keys.size(), rules, poller);
      }
    }
  }

 private:
  /// What the rows see, and where it has its place.
  void find_keys(std::span<const Index> rows) {
    spans_.clear();
    spans_of_.assign(1, 0);
    places_.clear();
    for (const Index row : rows) {
      const std::size_t begin = spans_.size();
      block_.spans(block_.positions[static_cast<std::size_t>(row)], spans_, scratch_spans_);
      places_.add({spans_.data() + begin, spans_.size() - begin});
      spans_of_.push_back(spans_.size());
    }
    places_.number();
    panels_ = (std::ssize(rows) * block_.heads() + lanes_ - 1) / lanes_;
    for (Index lane = 0; lane < panels_ * lanes_; ++lane) {
      const Index i = lane / block_.heads();
      row_of_[static_cast<std::size_t>(lane)] =
          i < std::ssize(rows) ? rows[static_cast<std::size_t>(i)] : -1;
    }
  }

  /// Takes the keys with these places: which rows of K they are, and which pairs are allowed.
  void take(std::span<const Index> rows, Range keys) {
    rows_of_keys_.clear();
    Index before = 0;
    for (const Range range : places_.keys()) {
      const Range some = intersect({keys.begin - before, keys.end - before}, {0, range.size()});
      if (!some.empty()) {
        rows_of_keys_.push_back({range.begin + some.begin, range.begin + some.end});
      }
      before += range.size();
    }
    note_positions(rows, keys.size());

    bits_.assign(static_cast<std::size_t>(panels_ * keys.size()), 0u);
    const Index heads = block_.heads();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const Range lanes{static_cast<Index>(i) * heads, static_cast<Index>(i + 1) * heads};
      for (Index p = lanes.begin / lanes_; p * lanes_ < lanes.end; ++p) {
        const Range own = intersect(lanes, {p * lanes_, (p + 1) * lanes_});
        const unsigned ones = bits_of({own.begin - p * lanes_, own.end - p * lanes_});
        unsigned* words = bits_.data() + p * keys.size();
        places_.each({spans_.data() + spans_of_[i], spans_of_[i + 1] - spans_of_[i]},
                     [&](Range places) {
                       const Range here = intersect(places, keys);
                       for (Index k = here.begin - keys.begin; k < here.end - keys.begin; ++k) {
                         words[k] |= ones;
                       }
                     });
      }
    }
    for (Index p = 0; p < panels_; ++p) {
      for (Index t = 0; t * kernel_.tile < keys.size(); ++t) find_pieces(p, t, keys.size());
    }
  }

  static unsigned bits_of(Range lanes) {
    return static_cast<unsigned>(((std::uint64_t{1} << lanes.size()) - 1) << lanes.begin);
  }

  /// Positions and weights of what is at hand, for score rules that ask for them.
  void note_positions(std::span<const Index> rows, Index keys) {
    here_ = {block_.where.shape,
             block_.where.query_heads,
             block_.where.key_heads,
             block_.where.value_heads,
             {},
             {},
             {}};
    const Score& score = block_.score;
    if (!score.alibi.empty() || !score.bias.empty()) {
      for (const Index row : rows) {
        const Index at = block_.positions[static_cast<std::size_t>(row)];
        Runs& runs = here_.queries;
        if (!runs.empty() && runs.back().step == 1 && runs.back().at(runs.back().count) == at) {
          ++runs.back().count;
        } else {
          runs.push_back({at, 1, 1});
        }
      }
      for (const Range range : rows_of_keys_) {
        const Runs runs = part(block_.where.keys, range);
        here_.keys.insert(here_.keys.end(), runs.begin(), runs.end());
      }
    }
    const View<const float>& from = block_.where.key_weights;
    if (from.data == nullptr) return;
    weights_.clear();
    for (const Range range : rows_of_keys_) {
      for (Index row = range.begin; row < range.end; ++row) {
        for (Index h = 0; h < from.heads; ++h) weights_.push_back(*from.at(row, h));
      }
    }
    here_.key_weights = {weights_.data(), keys, from.heads, 1};
  }

  Range tile(Index t, Index keys) const {
    return {t * kernel_.tile, std::min(keys, (t + 1) * kernel_.tile)};
  }
  std::vector<Piece>& pieces(Index p, Index t) {
    return pieces_[static_cast<std::size_t>(p * most_tiles_ + t)];
  }

  /// Live pieces of a panel and a tile, from the bits of its keys: as LiveRows::pieces has them.
  void find_pieces(Index p, Index t, Index keys) {
    std::vector<Piece>& out = pieces(p, t);
    out.clear();
    const Range of_tile = tile(t, keys);
    const unsigned* words = bits_.data() + p * keys + of_tile.begin;
    const Index used = std::min(lanes_, lanes_used() - p * lanes_);
    const Index lanes_of_part = lanes_ / kernel_.parts;
    const auto count = static_cast<int>(of_tile.size());
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
        some |= words[j];
        all &= words[j];
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

  void attend_to(const HeadGroup& group, std::span<const Index> rows, Index keys,
                 const BlockRules& rules, Poller& poller) {
    start(group, rules);
    std::vector<Range>::const_iterator range = rows_of_keys_.begin();
    Index done = 0;  // rows of *range in the tiles before
    for (Index t = 0; t * kernel_.tile < keys; ++t) {
      const Range now = tile(t, keys);
      gather(group, now.size(), range, done);
      kernel_.pack_k(rows_at(k_rows_.get(), now.size(), block_.d_qk()), k_pack_.get());
      kernel_.pack_v(rows_at(v_rows_.get(), now.size(), block_.d_v()), v_pack_.get());
      const bool finite =
          all_finite(View<const T>{v_rows_.get(), now.size(), 1, block_.v.dim}, 0, {0, now.size()});
      for (Index p = 0; p < panels_; ++p) {
        if (pieces(p, t).empty()) continue;
        step(group, p, t, now, keys, finite);
        poller.after(static_cast<double>(lanes_ * now.size() * 2) *
                     static_cast<double>(block_.q.dim + block_.v.dim));
      }
    }
    finish(group, rows);
  }

  static Rows rows_at(const T* rows, Index count, int dim) {
    return {rows, dim, static_cast<int>(count), dim, element_of<T>()};
  }

  void start(const HeadGroup& group, const BlockRules& rules) {
    std::fill(begun_.begin(), begun_.end(), false);
    std::fill(m_.begin(), m_.end(), -std::numeric_limits<float>::infinity());
    std::fill(l_.begin(), l_.end(), 0.0);
    rules_.clear();
    std::vector<const void*> row(static_cast<std::size_t>(lanes_));
    std::vector<Index> local(row.size());
    std::vector<Index> head(row.size());
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

  /// Copies the next `count` keys and values; `range` and `done` say where they begin.
  void gather(const HeadGroup& group, Index count, std::vector<Range>::const_iterator& range,
              Index& done) {
    for (Index to = 0; to < count;) {
      const Index size = std::min(count - to, range->size() - done);
      if (done == 0 && range + 1 != rows_of_keys_.end()) {
        prefetch(block_.k, group.key_head, range[1]);
        prefetch(block_.v, group.value_head, range[1]);
      }
      for (Index i = 0; i < size; ++i, ++to) {
        const Index row = range->begin + done + i;
        std::copy_n(block_.k.at(row, group.key_head), block_.q.dim,
                    k_rows_.get() + to * block_.q.dim);
        std::copy_n(block_.v.at(row, group.value_head), block_.v.dim,
                    v_rows_.get() + to * block_.v.dim);
      }
      done += size;
      if (done < range->size()) continue;
      ++range;
      done = 0;
    }
  }

  void step(const HeadGroup& group, Index p, Index t, Range now, Index keys, bool finite) {
    const std::vector<Piece>& found = pieces(p, t);
    const bool masked =
        std::any_of(found.begin(), found.end(), [](const Piece& x) { return x.masked; });
    PanelRules& rules = rules_[static_cast<std::size_t>(p)];
    rules.keys(now, group.key_head);
    const unsigned* words = bits_.data() + p * keys + now.begin;
    const ForwardStep s{.q = q_.get() + p * q_bytes_,
                        .k = k_pack_.get(),
                        .v = v_pack_.get(),
                        .d_qk = block_.d_qk(),
                        .d_v = block_.d_v(),
                        .pieces = found.data(),
                        .piece_count = static_cast<int>(found.size()),
                        .allowed = masked ? Lanes{nullptr, nullptr, words} : Lanes{},
                        .rules = rules.rules(),
                        .normalizer = normalizer_,
                        .scratch = scratch_.get(),
                        .m = m_.data() + p * lanes_,
                        .l = l_.data() + p * lanes_,
                        .o = o_.get() + p * lanes_ * block_.v.dim,
                        .first = !begun_[static_cast<std::size_t>(p)]};
    begun_[static_cast<std::size_t>(p)] = true;
    if (!masked || finite) return kernel_.forward(s);
    forward_apart<T>(
        kernel_, s, {row_of_.data() + p * lanes_, static_cast<std::size_t>(lanes_)}, now.size(),
        [&](std::size_t lane, std::vector<unsigned>& sees) {
          for (std::size_t j = 0; j < sees.size(); ++j) sees[j] = words[j] >> lane & 1u;
        },
        [&](Index key) { return v_rows_.get() + key * block_.v.dim; });
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
  Index most_tiles_;
  Index panels_ = 0;
  Index q_bytes_;
  Buffer<std::byte> q_;
  Buffer<float> o_;
  Buffer<std::byte> scratch_;
  Buffer<std::byte> k_pack_, v_pack_;
  Buffer<T> k_rows_, v_rows_;  ///< of a tile
  std::vector<float> m_;
  std::vector<double> l_;
  std::vector<Index> row_of_;  ///< of each lane, in the block; -1 where there is none
  Normalizer normalizer_;
  std::vector<bool> begun_;  ///< the panels that have something in o_
  std::vector<Range> spans_, scratch_spans_;
  std::vector<std::size_t> spans_of_;  ///< where those of each row begin
  Places places_;
  std::vector<Range> rows_of_keys_;         ///< in the block, of the keys at hand
  std::vector<unsigned> bits_;              ///< [panels][keys at hand] lanes that see the key
  std::vector<std::vector<Piece>> pieces_;  ///< [panels][tiles]
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

/// Rows strip by strip, and the patches that they are cut into.
struct Order {
  std::vector<Index> rows;
  std::vector<Range> patches;
};

Order order_of(const std::vector<Index>& positions, const Patches& patches, Index most_rows) {
  Order order;
  std::vector<Index> end(static_cast<std::size_t>(patches.strips()) + 1);
  for (const Index at : positions) ++end[static_cast<std::size_t>(patches.strip(at)) + 1];
  for (std::size_t i = 1; i < end.size(); ++i) end[i] += end[i - 1];
  order.rows.resize(positions.size());
  for (std::size_t s = 0; s + 1 < end.size(); ++s) {
    const Index count = end[s + 1] - end[s];
    const Index parts = (count + most_rows - 1) / most_rows;
    for (Index i = 0; i < parts; ++i) {
      const Range part = even_part(count, parts, i);
      order.patches.push_back({end[s] + part.begin, end[s] + part.end});
    }
  }
  for (std::size_t row = 0; row < positions.size(); ++row) {
    Index& at = end[static_cast<std::size_t>(patches.strip(positions[row]))];
    order.rows[static_cast<std::size_t>(at++)] = static_cast<Index>(row);
  }
  return order;
}

}  // namespace

template <class T>
void attend_patches(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                    const Where& where, const Mask& mask, const Work& work, const Patches& patches,
                    const std::vector<HeadGroup>& groups) {
  const PatchBlock<T> block{q,          k,
                            v,          out,
                            where,      mask,
                            work.score, kernel_of<T>(work),
                            groups,     positions_of(where.queries)};
  const Order order = order_of(block.positions, patches, kPatchLanes / block.heads());
  const Index count = std::ssize(order.patches);
  const Index of_groups =
      std::clamp<Index>((kLeastUnits + count - 1) / count, 1, std::ssize(groups));
  Caught caught;
#pragma omp parallel num_threads(work.threads)
  {
    const Entered entered(block.kernel);
    Poller poller(work.poll, caught, omp_get_thread_num() == 0);
    PatchWorker<T> worker(block);
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < count * of_groups; ++i) {
      const Range rows = order.patches[static_cast<std::size_t>(i / of_groups)];
      worker.run({order.rows.data() + rows.begin, static_cast<std::size_t>(rows.size())},
                 even_part(std::ssize(groups), of_groups, i % of_groups), poller);
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

Index attend_patches_bytes(const Shape& shape, const Kernel& kernel) {
  const auto d_qk = static_cast<int>(shape.d_qk);
  const auto d_v = static_cast<int>(shape.d_v);
  const Index lanes = kPatchLanes + kernel.lanes;
  const Index panels = lanes / kernel.lanes;
  const Index keys = tiles_at_a_time(kernel) * kernel.tile;
  const Index pieces = panels * keys / kernel.granule * static_cast<Index>(sizeof(Piece));
  return lanes * (shape.d_qk + shape.d_v + 8) * 4 + aligned(kernel.k_size(d_qk)) +
         aligned(kernel.v_size(d_v)) + aligned(kernel.forward_scratch(d_qk, d_v)) +
         kernel.tile * (shape.d_qk + shape.d_v) * 4 + panels * keys * 4 + 2 * pieces;
}

}  // namespace dattn
