#include "kernels/bands.hpp"

#include <cstdlib>
#include <utility>

namespace dattn {

std::vector<Band> bands_of(const Runs& runs) {
  if (runs.size() == 1 && runs.front().count > 0) {  // by far the most frequent
    const Run& run = runs.front();
    if (run.step == 1) return {{run.first, run.count, run.count, 1}};
    if (run.count > 1) return {{run.first, 1, run.step, run.count}};
  }
  Runs sorted;
  for (const Run& run : runs) {
    if (run.count > 0) sorted.push_back({run.first, run.count, run.count == 1 ? 1 : run.step});
  }
  std::sort(sorted.begin(), sorted.end(), [](const Run& a, const Run& b) {
    return std::pair(a.step, a.first) < std::pair(b.step, b.first);
  });
  std::vector<Band> strided;
  std::vector<Range> pieces;
  for (std::size_t i = 0; i < sorted.size();) {
    const Index step = sorted[i].step;
    if (step == 1) {
      pieces.push_back(sorted[i++].bounds());
      continue;
    }
    std::size_t end = i + 1;
    Index rounds = sorted[i].count;
    while (end < sorted.size() && sorted[end].step == step &&
           sorted[end].first == sorted[end - 1].first + 1 &&
           sorted[end].first < sorted[i].first + step &&
           std::abs(sorted[end].count - sorted[i].count) <= 1) {  // those of others are no round
      rounds = std::min(rounds, sorted[end++].count);
    }
    const auto width = static_cast<Index>(end - i);
    if (width == step) {
      pieces.push_back({sorted[i].first, sorted[i].first + step * rounds});
    } else {
      strided.push_back({sorted[i].first, width, step, rounds});
    }
    for (; i < end; ++i) {  // members beyond the rounds that all of them have
      for (Index n = rounds; n < sorted[i].count; ++n) {
        pieces.push_back({sorted[i].at(n), sorted[i].at(n) + 1});
      }
    }
  }
  std::sort(pieces.begin(), pieces.end());
  std::vector<Band> out;
  for (const Range p : pieces) {
    if (!out.empty() && out.back().bounds().end == p.begin) {
      out.back().width += p.size();
      out.back().step = out.back().width;
    } else {
      out.push_back({p.begin, p.size(), p.size(), 1});
    }
  }
  out.insert(out.end(), strided.begin(), strided.end());
  return out;
}

bool dense(const std::vector<Band>& bands) {
  return std::all_of(bands.begin(), bands.end(), [](const Band& b) { return b.rounds == 1; });
}

Runs runs_of(const std::vector<Band>& bands) {
  Runs runs;
  for (const Band& b : bands) {
    for (Index i = 0; i < b.rounds; ++i) runs.push_back({b.first + i * b.step, b.width, 1});
  }
  return runs;
}

Members::Members(std::vector<Band> bands) {
  std::sort(bands.begin(), bands.end(),
            [](const Band& a, const Band& b) { return a.first < b.first; });
  for (const Band& band : bands) {
    auto to = std::find_if(chains_.begin(), chains_.end(), [&](const Chain& chain) {
      return chain.bands.back().bounds().end <= band.first;
    });
    if (to == chains_.end()) to = chains_.insert(to, Chain{});
    const Index before = to->bands.empty() ? 0 : to->before.back() + to->bands.back().size();
    to->bands.push_back(band);
    to->before.push_back(before);
  }
}

}  // namespace dattn
