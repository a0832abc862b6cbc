#include "kernels/live.hpp"

#include <algorithm>
#include <array>
#include <limits>

#include "kernels/check.hpp"

namespace dattn {

std::vector<HeadGroup> head_groups(const Where& where, const Mask& mask) {
  std::vector<HeadGroup> groups;
  Index variant = 0;
  for (Index h = where.query_heads.begin; h < where.query_heads.end; ++h) {
    const Index key = where.shape.key_head(h) - where.key_heads.begin;
    const Index value = where.shape.value_head(h) - where.value_heads.begin;
    const Index local = h - where.query_heads.begin;
    if (!groups.empty() && groups.back().key_head == key && groups.back().value_head == value &&
        mask.variant(h) == variant) {
      groups.back().heads.end = local + 1;
    } else {
      variant = mask.variant(h);
      groups.push_back({{local, local + 1}, key, value});
    }
  }
  return groups;
}

LiveRows::LiveRows(const Where& where, const Mask& mask, Index head, Range rows, Range keys)
    : rows_(rows) {
  const Runs queries = part(where.queries, rows);
  // A run of keys of which some row sees something, in `members` of it, `before` key rows in.
  struct Seen {
    const Run& run;
    Range members;
    Index before;
    bool all;
  };
  // What all rows at once see of a run spares most of the questions about single rows.
  std::vector<Seen> runs;
  Index before = 0;
  for (const Run& k : where.keys) {
    const Range members = intersect({keys.begin - before, keys.end - before}, {0, k.count});
    before += k.count;
    if (members.empty()) continue;
    bool none = true;
    bool all = true;
    for (const Run& q : queries) {
      if (q.count == 0) continue;
      const Cover one = mask.cover(head, q.bounds(), k.part(members).bounds());
      none = none && one == Cover::None;
      all = all && one == Cover::All;
    }
    if (!none) runs.push_back({k, members, before - k.count, all});
  }
  if (runs.empty()) return;  // often: nothing is kept then
  row_.reserve(static_cast<std::size_t>(rows.size()));
  one_.reserve(row_.capacity());
  std::vector<Range> spans;
  for (const Run& q : queries) {
    for (Index i = 0; i < q.count;) {
      const std::size_t begin = spans_.size();
      Index same = kAllAlike;
      for (const Seen& seen : runs) {
        const auto add = [&](Range members) {
          append(spans_, begin, {seen.before + members.begin, seen.before + members.end});
        };
        if (seen.all) {
          add(seen.members);
          continue;
        }
        const Run run = seen.run.part(seen.members);
        spans.clear();
        Index first = 0;  // what spans are counted from
        if (run.step == 1) {
          mask.spans(head, q.at(i), run.bounds(), spans);
          first = run.first;
        } else {
          mask.members(head, q.at(i), run, spans);
        }
        for (const Range span : spans) {
          add({seen.members.begin + span.begin - first, seen.members.begin + span.end - first});
        }
        same = std::min(same, mask.alike(head, q.at(i), run.bounds()));
      }
      const std::size_t end = spans_.size();
      single_ = single_ && end - begin <= 1;
      const Range one = end > begin ? spans_[begin] : Range{0, 0};
      const Index from = i++;
      while (i < q.count && q.at(i) - q.at(from) < same) ++i;
      row_.insert(row_.end(), static_cast<std::size_t>(i - from), {begin, end, begin});
      one_.insert(one_.end(), static_cast<std::size_t>(i - from), one);
    }
  }
}

Range LiveRows::bounds(Range rows) const {
  Range out{0, 0};
  for (Index row = rows.begin; row < rows.end && single_; ++row) {
    const Range seen = one_[static_cast<std::size_t>(row - rows_.begin)];
    if (seen.empty()) continue;
    out = out.empty() ? seen : Range{std::min(out.begin, seen.begin), std::max(out.end, seen.end)};
  }
  for (Index row = rows.begin; row < rows.end && !single_; ++row) {
    const std::span<const Range> spans = of(row);
    if (spans.empty()) continue;
    const Range seen{spans.front().begin, spans.back().end};
    out = out.empty() ? seen : Range{std::min(out.begin, seen.begin), std::max(out.end, seen.end)};
  }
  return out;
}

Range LiveRows::whole() const {
  if (none() || !single_) return {0, 0};
  Range out = one_.front();
  for (const Range seen : one_) out = intersect(out, seen);
  return out;
}

std::span<const Range> LiveRows::from(Index row, Index key) const {
  if (none()) return {};
  const Row& own = row_[static_cast<std::size_t>(row - rows_.begin)];
  // Tiles are asked for in ascending order: nearly always the span is the last one or one of the
  // next. Where it is not, all are searched.
  constexpr std::size_t kNear = 4;
  const Range* spans = spans_.data();
  std::size_t at = own.at;
  const bool back = at > own.begin && spans[at - 1].end > key;
  if (!back) {
    const std::size_t near = std::min(own.end, at + kNear);
    while (at < near && spans[at].end <= key) ++at;
  }
  if (back || (at < own.end && spans[at].end <= key)) {
    at = static_cast<std::size_t>(
        std::upper_bound(spans + own.begin, spans + own.end, key,
                         [](Index x, const Range& span) { return x < span.end; }) -
        spans);
  }
  own.at = at;
  return {spans + at, spans + own.end};
}

Index LiveRows::next(Index key) const {
  Index found = std::numeric_limits<Index>::max();
  for (Index row = rows_.begin; row < rows_.end; ++row) {
    const std::span<const Range> spans = from(row, key);
    if (!spans.empty()) found = std::min(found, std::max(key, spans.front().begin));
  }
  return found;
}

void LiveRows::pieces(std::span<const Range> parts, Range tile, int granule,
                      std::vector<Piece>& out) const {
  out.clear();
  if (none()) return;
  const auto count = static_cast<int>(tile.size());
  // Most tiles are seen by all rows or by none.
  bool all = true;
  bool none = true;
  for (const Range rows : parts) {
    if (single_) {
      for (Index row = rows.begin; row < rows.end; ++row) {
        const Range seen = one_[static_cast<std::size_t>(row - rows_.begin)];
        all &= (seen.begin <= tile.begin) & (seen.end >= tile.end);
        none &= (seen.begin >= tile.end) | (seen.end <= tile.begin);
      }
    } else {
      for (Index row = rows.begin; row < rows.end && (all || none); ++row) {
        const std::span<const Range> spans = from(row, tile.begin);
        all = all && !spans.empty() && spans.front().contains(tile);
        none = none && (spans.empty() || spans.front().begin >= tile.end);
      }
    }
  }
  if (none) return;
  const unsigned everywhere = (1u << parts.size()) - 1;
  if (all) {
    out.push_back({0, count, false});
    return;
  }
  // Pairs seen of each granule, and by how many more rows a granule is seen whole than the one
  // before.
  constexpr int kMost = 64;
  struct Counts {
    std::array<int, kMost> seen{};
    std::array<int, kMost + 1> whole{};
    int rows_whole = 0;
  };
  constexpr std::size_t kMostParts = 2;
  std::array<Counts, kMostParts> counts;
  CHECK(parts.size() <= kMostParts, parts.size());
  const int granules = (count + granule - 1) / granule;
  CHECK(granules <= kMost, granules);
  // A division costs as much as the rest. This is exact: the factor is too large by less than
  // granule / 2^20.
  constexpr int kShift = 20;
  CHECK(kMost * granule * granule < 1 << kShift, granule);
  const int factor = ((1 << kShift) + granule - 1) / granule;
  const auto granule_of = [&](int key) { return (key * factor) >> kShift; };
  for (std::size_t i = 0; i < parts.size(); ++i) {
    auto& [seen, whole, rows_whole] = counts[i];
    for (Index row = parts[i].begin; row < parts[i].end; ++row) {
      for (const Range span : from(row, tile.begin)) {
        if (span.begin >= tile.end) break;
        const auto begin = static_cast<int>(std::max(span.begin, tile.begin) - tile.begin);
        const auto end = static_cast<int>(std::min(span.end, tile.end) - tile.begin);
        const int first = granule_of(begin);
        const int last = granule_of(end - 1);
        if (first == last) {
          seen[static_cast<std::size_t>(first)] += end - begin;
          continue;
        }
        seen[static_cast<std::size_t>(first)] += (first + 1) * granule - begin;
        seen[static_cast<std::size_t>(last)] += end - last * granule;
        ++whole[static_cast<std::size_t>(first + 1)];
        --whole[static_cast<std::size_t>(last)];
      }
    }
  }
  for (int g = 0; g < granules; ++g) {
    const int size = std::min(granule, count - g * granule);
    unsigned live = 0;
    bool masked = false;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      auto& [seen, whole, rows_whole] = counts[i];
      rows_whole += whole[static_cast<std::size_t>(g)];
      const Index pairs = seen[static_cast<std::size_t>(g)] + rows_whole * size;
      if (pairs == 0) continue;
      live |= 1u << i;
      masked = masked || pairs < parts[i].size() * size;
    }
    if (live == 0) continue;
    if (live == everywhere) live = Piece::kAll;
    if (!out.empty() && out.back().masked == masked && out.back().live == live &&
        out.back().first + out.back().count == g * granule) {
      out.back().count += size;
    } else {
      out.push_back({g * granule, size, masked, live});
    }
  }
}

bool LiveRows::interval(Index row, Range tile, Range& out) const {
  if (single_ && !none()) {
    const Range part = intersect(one_[static_cast<std::size_t>(row - rows_.begin)], tile);
    out = part.empty() ? Range{0, 0} : Range{part.begin - tile.begin, part.end - tile.begin};
    return true;
  }
  const std::span<const Range> spans = from(row, tile.begin);
  if (spans.empty() || spans.front().begin >= tile.end) {
    out = {0, 0};
    return true;
  }
  const Range part = intersect(spans.front(), tile);
  out = {part.begin - tile.begin, part.end - tile.begin};
  return spans.size() == 1 || spans[1].begin >= tile.end;
}

void LiveRows::mark(Index row, Range tile, unsigned bit, unsigned* words) const {
  for (const Range span : from(row, tile.begin)) {
    if (span.begin >= tile.end) break;
    const Range part = intersect(span, tile);
    for (Index k = part.begin; k < part.end; ++k) words[k - tile.begin] |= bit;
  }
}

Ranges keys_seen(std::span<const LiveRows> live) {
  std::vector<Range> all;
  for (const LiveRows& rows : live) {
    for (Index row = rows.rows().begin; row < rows.rows().end; ++row) {
      const std::span<const Range> seen = rows.of(row);
      all.insert(all.end(), seen.begin(), seen.end());
    }
  }
  return union_of(std::move(all));
}

std::vector<Range> even_cuts(const Ranges& members, Index parts) {
  std::vector<Range> cuts;
  const Index count = size(members);
  auto in = members.begin();
  Index before = 0;  // members of the ranges before `in`
  const auto member = [&](Index n) {
    while (n >= before + in->size()) before += (in++)->size();
    return in->begin + n - before;
  };
  for (Index part = 0; part < parts; ++part) {
    const Range own = even_part(count, parts, part);
    const Index first = member(own.begin);
    cuts.push_back({first, member(own.end - 1) + 1});
  }
  return cuts;
}

Lanes LaneMasks::spell(const LiveRows& live, std::span<const Index> row_of_lane, Range tile) {
  bool intervals = true;
  for (std::size_t lane = 0; lane < row_of_lane.size(); ++lane) {
    Range seen{0, 0};
    if (row_of_lane[lane] >= 0) {
      // The heads of a row see the same.
      if (lane > 0 && row_of_lane[lane] == row_of_lane[lane - 1]) {
        seen = {begin_[lane - 1], end_[lane - 1]};
      } else {
        intervals = live.interval(row_of_lane[lane], tile, seen) && intervals;
      }
    }
    begin_[lane] = static_cast<int>(seen.begin);
    end_[lane] = static_cast<int>(seen.end);
  }
  if (intervals) return {begin_.data(), end_.data(), nullptr};
  std::fill(bits_.begin(), bits_.end(), 0u);
  for (std::size_t lane = 0; lane < row_of_lane.size(); ++lane) {
    if (row_of_lane[lane] >= 0) live.mark(row_of_lane[lane], tile, 1u << lane, bits_.data());
  }
  return {begin_.data(), end_.data(), bits_.data()};
}

}  // namespace dattn
