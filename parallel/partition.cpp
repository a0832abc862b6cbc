#include "parallel/partition.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <numeric>
#include <queue>
#include <set>

#include "kernels/area.hpp"
#include "kernels/check.hpp"

namespace dattn {
namespace {

std::vector<Runs> contiguous(Index tokens, int ranks, const Shape&, const Mask&, const Speeds&) {
  std::vector<Runs> owned(static_cast<std::size_t>(ranks));
  for (int r = 0; r < ranks; ++r) {
    const Range part = even_part(tokens, ranks, r);
    owned[static_cast<std::size_t>(r)] = {{part.begin, part.size(), 1}};
  }
  return owned;
}

/// 2P chunks; rank r owns chunks r and 2P-1-r, so that early and late rows of a causal mask meet.
std::vector<Runs> zigzag(Index tokens, int ranks, const Shape&, const Mask&, const Speeds&) {
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
std::vector<Runs> striped(Index tokens, int ranks, const Shape&, const Mask&, const Speeds&) {
  std::vector<Runs> owned(static_cast<std::size_t>(ranks));
  for (int r = 0; r < ranks; ++r) {
    const Index count = tokens > r ? (tokens - r - 1) / ranks + 1 : 0;
    owned[static_cast<std::size_t>(r)] = {{r, count, ranks}};
  }
  return owned;
}

/// Which blocks each rank has, by rank.
using Hands = std::vector<std::vector<Index>>;

/// Heaviest first.
std::vector<Index> by_weight(const std::vector<Index>& area) {
  std::vector<Index> order(area.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
    return area[static_cast<std::size_t>(a)] > area[static_cast<std::size_t>(b)];
  });
  return order;
}

/// Deals blocks out in rounds, heaviest first, each round's heaviest block to the least loaded
/// rank: all ranks get the same number of blocks, and nearly the same area.
Hands deal_evenly(const std::vector<Index>& area, int ranks) {
  const std::vector<Index> order = by_weight(area);
  Hands dealt(static_cast<std::size_t>(ranks));
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
  return dealt;
}

/// How many of `blocks` blocks each rank gets, so that the most that one has over its speed is
/// least (the divisor method of D'Hondt).
std::vector<Index> shares(Index blocks, int ranks, const Speeds& speeds) {
  Index sum = 0;
  for (int r = 0; r < ranks; ++r) sum += speeds.parts(r);
  std::vector<Index> share;
  using Next = std::pair<double, int>;  // what a rank would have over its speed with one more
  std::priority_queue<Next, std::vector<Next>, std::greater<>> least;
  const auto offer = [&](int r) {
    least.emplace(static_cast<double>(share[static_cast<std::size_t>(r)] + 1) / speeds.of(r), r);
  };
  Index left = blocks;
  for (int r = 0; r < ranks; ++r) {
    share.push_back(blocks * speeds.parts(r) / sum);
    left -= share.back();
    offer(r);
  }
  for (; left > 0; --left) {
    const int r = least.top().second;
    least.pop();
    ++share[static_cast<std::size_t>(r)];
    offer(r);
  }
  return share;
}

/// The same where speeds differ: each rank gets its share of blocks, and the heaviest that is left
/// goes to the rank that would be through with it first.
Hands deal_by_speed(const std::vector<Index>& area, int ranks, const Speeds& speeds) {
  std::vector<Index> share = shares(std::ssize(area), ranks, speeds);
  // Of ranks of one speed the least loaded comes first, so that one of each speed is looked at.
  std::map<Index, std::set<std::pair<Index, int>>> waiting;
  for (int r = 0; r < ranks; ++r) {
    if (share[static_cast<std::size_t>(r)] > 0) waiting[speeds.parts(r)].emplace(0, r);
  }
  Hands dealt(static_cast<std::size_t>(ranks));
  for (const Index block : by_weight(area)) {
    const Index more = area[static_cast<std::size_t>(block)];
    const auto end = [&](const auto& equals) {
      return static_cast<double>(equals.second.begin()->first + more) /
             static_cast<double>(equals.first);
    };
    const auto first =
        std::min_element(waiting.begin(), waiting.end(),
                         [&](const auto& a, const auto& b) { return end(a) < end(b); });
    const auto [load, rank] = *first->second.begin();
    first->second.erase(first->second.begin());
    dealt[static_cast<std::size_t>(rank)].push_back(block);
    if (--share[static_cast<std::size_t>(rank)] > 0) first->second.emplace(load + more, rank);
    if (first->second.empty()) waiting.erase(first);
  }
  return dealt;
}

/// The rows of these of `blocks` equal blocks.
std::vector<Runs> rows_of(Hands hands, Index tokens, Index blocks) {
  std::vector<Runs> owned(hands.size());
  for (std::size_t r = 0; r < owned.size(); ++r) {
    std::sort(hands[r].begin(), hands[r].end());
    for (const Index b : hands[r]) {
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

/// Blocks of rows dealt out by allowed area, finer until the rank that takes longest is near the
/// mean; where speeds differ and that is near enough, pieces of rows.
std::vector<Runs> balanced(Index tokens, int ranks, const Shape& shape, const Mask& mask,
                           const Speeds& speeds) {
  constexpr double kNear = 1.01;
  // Blocks a rank, and rows a block: finer ones cost more in tiles than they even out.
  constexpr Index kFinest = 64;
  constexpr Index kFewestRows = 8;
  const auto kinds = variants(mask, {0, shape.query_heads});
  const auto area_of = [&](Runs queries) {
    for (Run& run : queries) run.first += shape.first_query();
    Index sum = 0;
    for (const auto& [head, heads] : kinds) {
      sum += heads * area(mask, head, queries, {{0, shape.keys, 1}});
    }
    return sum;
  };
  std::vector<Runs> best;
  double best_peak = 0;
  const auto offer = [&](std::vector<Runs> owned) {
    double peak = 0;  // of area over speed
    double speed = 0;
    Index total = 0;
    for (std::size_t r = 0; r < owned.size(); ++r) {
      const Index sum = area_of(owned[r]);
      const double own = speeds.of(static_cast<int>(r));
      peak = std::max(peak, static_cast<double>(sum) / own);
      speed += own;
      total += sum;
    }
    const double ratio = total == 0 ? 1.0 : peak * speed / static_cast<double>(total);
    if (best.empty() || ratio < best_peak) {
      best = std::move(owned);
      best_peak = ratio;
    }
    return best_peak <= kNear;
  };
  if (!speeds.equal() && offer(pieces_by_speed(tokens, ranks, speeds))) return best;
  for (Index per_rank = 2; per_rank <= kFinest; per_rank *= 2) {
    const Index blocks = std::min(tokens, per_rank * ranks);
    std::vector<Index> areas;
    for (Index b = 0; b < blocks; ++b) {
      const Range rows = even_part(tokens, blocks, b);
      areas.push_back(area_of({{rows.begin, rows.size(), 1}}));
    }
    Hands hands = speeds.equal() ? deal_evenly(areas, ranks) : deal_by_speed(areas, ranks, speeds);
    if (offer(rows_of(std::move(hands), tokens, blocks))) break;
    if (tokens < 2 * blocks * kFewestRows) break;
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

std::vector<Runs> turns_by_speed(Index tokens, int ranks, const Speeds& speeds) {
  constexpr Index kSteps = 16;
  std::vector<Index> weight;
  Index common = 0;  // to divide by: the shorter a turn, the fewer runs
  for (int r = 0; r < ranks; ++r) {
    weight.push_back(
        std::max<Index>(1, (speeds.parts(r) * kSteps + Speeds::kFastest / 2) / Speeds::kFastest));
    common = std::gcd(common, weight.back());
  }
  for (Index& each : weight) each /= common;
  // Every turn a rank gains what it weighs, and whoever is ahead pays for all: no rank is ever a
  // whole token ahead of its share or behind it.
  const Index turn = std::accumulate(weight.begin(), weight.end(), Index{0});
  std::vector<Index> credit(weight.size(), 0);
  std::vector<Runs> owned(weight.size());
  for (Index place = 0; place < turn; ++place) {
    for (std::size_t r = 0; r < weight.size(); ++r) credit[r] += weight[r];
    const auto next =
        static_cast<std::size_t>(std::max_element(credit.begin(), credit.end()) - credit.begin());
    credit[next] -= turn;
    const Index count = tokens > place ? (tokens - place - 1) / turn + 1 : 0;
    owned[next].push_back({place, count, turn});
  }
  return owned;
}

std::vector<Runs> pieces_by_speed(Index tokens, int ranks, const Speeds& speeds) {
  Index sum = 0;
  for (int r = 0; r < ranks; ++r) sum += speeds.parts(r);
  std::vector<Runs> owned;
  Index before = 0;
  for (int r = 0; r < ranks; ++r) {
    const Index begin = even_part(tokens, sum, before).begin;
    before += speeds.parts(r);
    owned.push_back({{begin, even_part(tokens, sum, before).begin - begin, 1}});
  }
  return owned;
}

std::span<const PartitionKind> partition_kinds() {
  static constexpr std::array kinds{
      PartitionKind{"contiguous", "rank r owns the r-th of P equal pieces", contiguous},
      PartitionKind{"zigzag", "rank r owns pieces r and 2P-1-r of 2P: even for a causal mask",
                    zigzag},
      PartitionKind{"striped", "token i belongs to rank i mod P: even for a causal mask", striped,
                    false, true},
      PartitionKind{"balanced",
                    "blocks of rows dealt out by allowed area and speed: even for any mask",
                    balanced, true},
  };
  return kinds;
}

}  // namespace dattn
