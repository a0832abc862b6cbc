#include "parallel/placement.hpp"

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>

#include "parallel/head_cost.hpp"

namespace dattn {
namespace {

/// Loads within this factor of each other count as equal: what replicates less is then better.
constexpr double kNear = 1.01;

Index load_of(const Ranges& heads, const std::vector<Index>& costs) {
  Index sum = 0;
  for (const Range r : heads) {
    sum = std::accumulate(costs.begin() + r.begin, costs.begin() + r.end, sum);
  }
  return sum;
}

/// By member, how fast it is.
using Pace = std::vector<double>;

/// Relative to the fastest one, so that equal members have 1.
Pace pace_of(int members, const std::vector<Index>& speeds) {
  Pace pace(static_cast<std::size_t>(members), 1);
  if (speeds.empty()) return pace;
  const auto fastest = static_cast<double>(*std::max_element(speeds.begin(), speeds.end()));
  for (std::size_t m = 0; m < pace.size(); ++m) {
    pace[m] = static_cast<double>(speeds[m]) / fastest;
  }
  return pace;
}

/// The heads `heads`, `unit` by unit, heaviest unit first, each to the member that is through with
/// it first; of members that are so at once to the one with fewest units.
std::vector<Ranges> by_cost(const std::vector<Index>& costs, const Ranges& heads, Index unit,
                            const Pace& pace) {
  std::map<Index, std::vector<Index>, std::greater<>> units_of;  // first heads, by cost
  for (const Range range : heads) {
    for (Index h = range.begin; h < range.end; h += unit) {
      units_of[load_of(Ranges{{h, h + unit}}, costs)].push_back(h);
    }
  }
  struct Member {
    Index load = 0;
    Index units = 0;
    std::vector<Range> heads;
  };
  std::vector<Member> all(pace.size());
  const auto place = [&](const Member& m) { return static_cast<std::size_t>(&m - all.data()); };
  for (const auto& [cost, same] : units_of) {
    std::vector<std::size_t> counts(all.size(), 0);
    for (std::size_t i = 0; i < same.size(); ++i) {
      const auto end = [&, more = cost](const Member& m) {
        return std::pair(static_cast<double>(m.load + more) / pace[place(m)], m.units);
      };
      const auto least =
          std::min_element(all.begin(), all.end(),
                           [&](const Member& a, const Member& b) { return end(a) < end(b); });
      least->load += cost;
      ++least->units;
      ++counts[static_cast<std::size_t>(least - all.begin())];
    }
    auto next = same.begin();
    for (std::size_t m = 0; m < all.size(); ++m) {
      for (std::size_t i = 0; i < counts[m]; ++i, ++next) {
        all[m].heads.push_back({*next, *next + unit});
      }
    }
  }
  std::vector<Ranges> placed;
  for (Member& member : all) placed.push_back(union_of(std::move(member.heads)));
  return placed;
}

/// Query heads that share a key head or a value head come in so many.
Index unit_of(const Shape& shape) {
  return std::lcm(shape.query_heads / shape.key_heads, shape.query_heads / shape.value_heads);
}

/// What the member that takes longest takes.
double most_of(const std::vector<Ranges>& placed, const std::vector<Index>& costs,
               const Pace& pace) {
  double most = 0;
  for (std::size_t m = 0; m < placed.size(); ++m) {
    most = std::max(most, static_cast<double>(load_of(placed[m], costs)) / pace[m]);
  }
  return most;
}

/// The first of these ways to place heads that is near enough to the most even one.
std::size_t first_near(const std::vector<std::vector<Ranges>>& ways,
                       const std::vector<Index>& costs, const Pace& pace) {
  double least = most_of(ways.front(), costs, pace);
  for (const auto& way : ways) least = std::min(least, most_of(way, costs, pace));
  std::size_t i = 0;
  while (most_of(ways[i], costs, pace) > kNear * least) ++i;
  return i;
}

}  // namespace

Placement place_heads(const Shape& shape, const Mask& mask, int members,
                      const std::vector<Index>& speeds) {
  const Pace pace = pace_of(members, speeds);
  const std::vector<Index> costs = cost_by_head(shape, mask);
  std::vector<Ranges> even;
  for (int m = 0; m < members; ++m) {
    append(even.emplace_back(), even_part(shape.query_heads, members, m));
  }
  const Ranges all{{0, shape.query_heads}};
  const std::vector<std::vector<Ranges>> ways{even, by_cost(costs, all, unit_of(shape), pace),
                                              by_cost(costs, all, 1, pace)};
  const std::size_t best = first_near(ways, costs, pace);
  const double mean =
      static_cast<double>(load_of(all, costs)) / std::accumulate(pace.begin(), pace.end(), 0.0);
  const auto over_mean = [&](const std::vector<Ranges>& way) {
    return mean > 0 ? most_of(way, costs, pace) / mean : 1;
  };
  return {ways[best], best == 0, over_mean(ways[best]), over_mean(even)};
}

HeadSplit split_heads(const Shape& shape, const Mask& mask, int members,
                      const std::vector<Index>& speeds) {
  constexpr Index kFewer = 4;
  const std::vector<Index> pairs = pairs_by_head(shape, mask);
  const Index unit = unit_of(shape);
  Index most = 0;
  for (Index h = 0; h < shape.query_heads; h += unit) {
    most = std::max(most, load_of(Ranges{{h, h + unit}}, pairs));
  }
  HeadSplit split;
  Ranges whole;
  for (Index h = 0; h < shape.query_heads; h += unit) {
    const bool few = load_of(Ranges{{h, h + unit}}, pairs) * kFewer <= most;
    append(few ? whole : split.shared, {h, h + unit});
  }
  const std::vector<Index> costs = cost_by_head(shape, mask);
  const Pace pace = pace_of(members, speeds);
  const std::vector<std::vector<Ranges>> ways{by_cost(costs, whole, unit, pace),
                                              by_cost(costs, whole, 1, pace)};
  split.whole = ways[first_near(ways, costs, pace)];
  return split;
}

}  // namespace dattn
