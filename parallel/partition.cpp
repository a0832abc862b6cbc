#include "parallel/partition.hpp"

#include <algorithm>
#include <array>
#include <numeric>

#include "kernels/area.hpp"
#include "kernels/check.hpp"

namespace dattn {
namespace {

std::vector<Runs> contiguous(Index tokens, int ranks, const Shape&, const Mask&) {
  std::vector<Runs> owned(static_cast<std::size_t>(ranks));
  for (int r = 0; r < ranks; ++r) {
    const Range part = even_part(tokens, ranks, r);
    owned[static_cast<std::size_t>(r)] = {{part.begin, part.size(), 1}};
  }
  return owned;
}

/// 2P chunks; rank r owns chunks r and 2P-1-r, so that early and late rows of a causal mask meet.
std::vector<Runs> zigzag(Index tokens, int ranks, const Shape&, const Mask&) {
  std::vector<Runs> owned(static_cast<std::size_t>(ranks));
  for (int r = 0; r < ranks; ++r) {
    for (const int chunk : {r, 2 * ranks - 1 - r}) {
      const Range part = even_part(tokens, 2 * ranks, chunk);
      owned[static_cast<std::size_t>(r)].push_back({part.begin, part.size(), 1});
    }
  }
  return owned;
}

/// Token i belongs to rank i mod P.
std::vector<Runs> striped(Index tokens, int ranks, const Shape&, const Mask&) {
  std::vector<Runs> owned(static_cast<std::size_t>(ranks));
  for (int r = 0; r < ranks; ++r) {
    const Index count = tokens > r ? (tokens - r - 1) / ranks + 1 : 0;
    owned[static_cast<std::size_t>(r)] = {{r, count, ranks}};
  }
  return owned;
}

/// Deals equal blocks of rows out in rounds, heaviest first, each round's heaviest block to the
/// least loaded rank: all ranks get the same number of blocks, and nearly the same area.
std::vector<Runs> deal_blocks(const std::vector<Index>& area, Index tokens, int ranks) {
  const auto blocks = static_cast<Index>(area.size());
  std::vector<Index> order(area.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
    return area[static_cast<std::size_t>(a)] > area[static_cast<std::size_t>(b)];
  });
  std::vector<std::vector<Index>> dealt(static_cast<std::size_t>(ranks));
  std::vector<Index> load(static_cast<std::size_t>(ranks), 0);
  std::vector<std::size_t> turn(static_cast<std::size_t>(ranks));
  for (std::size_t next = 0; next < order.size(); next += turn.size()) {
    std::iota(turn.begin(), turn.end(), std::size_t{0});
    std::stable_sort(turn.begin(), turn.end(),
                     [&](std::size_t a, std::size_t b) { return load[a] < load[b]; });
    for (std::size_t i = 0; i < turn.size() && next + i < order.size(); ++i) {
      dealt[turn[i]].push_back(order[next + i]);
      load[turn[i]] += area[static_cast<std::size_t>(order[next + i])];
    }
  }
  std::vector<Runs> owned(static_cast<std::size_t>(ranks));
  for (std::size_t r = 0; r < owned.size(); ++r) {
    std::sort(dealt[r].begin(), dealt[r].end());
    for (const Index b : dealt[r]) {
      const Range rows = even_part(tokens, blocks, b);
      if (!owned[r].empty() && owned[r].back().bounds().end == rows.begin) {
        owned[r].back().count += rows.size();
      } else {
        owned[r].push_back({rows.begin, rows.size(), 1});
      }
    }
  }
  return owned;
}

/// Blocks of rows dealt out by allowed area, finer until the most loaded rank is near the mean.
std::vector<Runs> balanced(Index tokens, int ranks, const Shape& shape, const Mask& mask) {
  constexpr double kNear = 1.01;
  // Blocks a rank, and rows a block: finer ones cost more in tiles than they even out.
  constexpr Index kFinest = 64;
  constexpr Index kFewestRows = 8;
  std::vector<Runs> best;
  double best_peak = 0;
  const auto kinds = variants(mask, {0, shape.query_heads});
  for (Index per_rank = 2; per_rank <= kFinest; per_rank *= 2) {
    const Index blocks = std::min(tokens, per_rank * ranks);
    std::vector<Index> areas;
    for (Index b = 0; b < blocks; ++b) {
      const Range rows = even_part(tokens, blocks, b);
      const Runs queries{{rows.begin + shape.first_query(), rows.size(), 1}};
      Index sum = 0;
      for (const auto& [head, heads] : kinds) {
        sum += heads * area(mask, head, queries, {{0, shape.keys, 1}});
      }
      areas.push_back(sum);
    }
    std::vector<Runs> owned = deal_blocks(areas, tokens, ranks);
    Index peak = 0;
    Index total = 0;
    for (const Runs& runs : owned) {
      Index sum = 0;
      Runs queries = runs;
      for (Run& run : queries) run.first += shape.first_query();
      for (const auto& [head, heads] : kinds) {
        sum += heads * area(mask, head, queries, {{0, shape.keys, 1}});
      }
      peak = std::max(peak, sum);
      total += sum;
    }
    const double ratio =
        total == 0 ? 1.0 : static_cast<double>(peak) * ranks / static_cast<double>(total);
    if (best.empty() || ratio < best_peak) {
      best = std::move(owned);
      best_peak = ratio;
    }
    if (best_peak <= kNear || tokens < 2 * blocks * kFewestRows) break;
  }
  return best;
}

}  // namespace

Partition::Partition(std::vector<Runs> owned, Index first) : owned_(std::move(owned)) {
  offsets_.push_back(0);
  for (Runs& runs : owned_) {
    std::erase_if(runs, [](const Run& run) { return run.count == 0; });
    for (Run& run : runs) run.first += first;
    offsets_.push_back(offsets_.back() + size(runs));
  }
}

Range Partition::rows(int rank) const {
  const auto r = static_cast<std::size_t>(rank);
  return {offsets_[r], offsets_[r + 1]};
}

int Partition::owner(Index row) const {
  CHECK(row >= 0 && row < tokens(), row, tokens());
  const auto after = std::upper_bound(offsets_.begin(), offsets_.end(), row);
  return static_cast<int>(after - offsets_.begin()) - 1;
}

Runs Partition::positions(const Ranges& rows) const {
  Runs out;
  for (Range left : rows) {
    while (!left.empty()) {
      const int rank = owner(left.begin);
      const Range own = this->rows(rank);
      const Range here = intersect(left, own);
      const Runs runs = part(owned_[static_cast<std::size_t>(rank)],
                             {here.begin - own.begin, here.end - own.begin});
      for (const Run& run : runs) {
        // What one rank's tokens go on with at the next one's is one run to a kernel.
        const bool goes_on = !out.empty() && out.back().step == run.step &&
                             out.back().at(out.back().count) == run.first;
        if (goes_on) {
          out.back().count += run.count;
        } else {
          out.push_back(run);
        }
      }
      left.begin = here.end;
    }
  }
  return out;
}

// A rank may own few of very many positions, and a query see few of very many keys: neither is
// walked through where the other has nothing.
template <class Visit>
void Partition::visit_at(int rank, const Ranges& positions, const Visit& visit) const {
  Index before = rows(rank).begin;
  for (const Run& run : owned_[static_cast<std::size_t>(rank)]) {
    const Range bounds = run.bounds();
    auto wanted = std::upper_bound(positions.begin(), positions.end(), bounds.begin,
                                   [](Index at, Range r) { return at < r.end; });
    for (; wanted != positions.end() && wanted->begin < bounds.end; ++wanted) {
      const Range members = run.inside(*wanted);
      if (!members.empty() && visit(Range{before + members.begin, before + members.end})) return;
    }
    before += run.count;
  }
}

Ranges Partition::rows_at(int rank, const Ranges& positions) const {
  Ranges out;
  visit_at(rank, positions, [&](Range found) {
    append(out, found);
    return false;
  });
  return out;
}

bool Partition::has_at(int rank, const Ranges& positions) const {
  bool any = false;
  visit_at(rank, positions, [&](Range) { return any = true; });
  return any;
}

std::span<const PartitionKind> partition_kinds() {
  static constexpr std::array kinds{
      PartitionKind{"contiguous", "rank r owns the r-th of P equal pieces", contiguous},
      PartitionKind{"zigzag", "rank r owns pieces r and 2P-1-r of 2P: even for a causal mask",
                    zigzag},
      PartitionKind{"striped", "token i belongs to rank i mod P: even for a causal mask", striped,
                    false, true},
      PartitionKind{"balanced", "blocks of rows dealt out by allowed area: even for any mask",
                    balanced, true},
  };
  return kinds;
}

}  // namespace dattn
