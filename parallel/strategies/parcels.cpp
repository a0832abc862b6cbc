#include "parallel/strategies/parcels.hpp"

#include <algorithm>
#include <set>

namespace dattn {
namespace {

int owner_of(const Piece& piece, int half) { return half == 0 ? piece.queries : piece.keys; }

}  // namespace

Parcels::Parcels(const Problem& problem, const Schedule& schedule, Pass pass, int rank)
    : problem_(problem), schedule_(schedule), pass_(pass) {
  if (!problem.relays()) return;
  const Hosts& hosts = problem.hosts();
  const int here = hosts.of(rank);
  std::map<Key, std::vector<std::size_t>> numbers;
  for (const int at : hosts.ranks(here)) {
    for (const Piece& piece : schedule.at(at)) {
      const auto number = static_cast<std::size_t>(&piece - schedule.pieces().data());
      for (const int half : {0, 1}) {
        const int owner = owner_of(piece, half);
        if (hosts.of(owner) != here) numbers[{owner, half, here}].push_back(number);
      }
    }
  }
  for (const std::size_t number : schedule.elsewhere(rank)) {
    const Piece& piece = schedule.pieces()[number];
    if (hosts.of(piece.at) == here) continue;
    for (const int half : {0, 1}) {
      if (owner_of(piece, half) == rank)
        numbers[{rank, half, hosts.of(piece.at)}].push_back(number);
    }
  }
  for (auto& [key, some] : numbers) make(key, std::move(some));
  for (std::size_t p = 0; p < all_.size(); ++p) {
    for (const std::size_t number : all_[p].readers) of_[{number, all_[p].half}].push_back(p);
  }
}

void Parcels::make(const Key& key, std::vector<std::size_t> numbers) {
  const auto [owner, half, host] = key;
  const Side side = half == 0 ? query_side(pass_) : key_side(pass_);
  if (side.inputs.empty() && side.sums.empty()) return;
  std::sort(numbers.begin(), numbers.end());
  std::set<Index> edges;
  for (const std::size_t n : numbers) {
    edges.insert(schedule_.pieces()[n].heads.begin);
    edges.insert(schedule_.pieces()[n].heads.end);
  }
  std::vector<Parcel> made;
  for (auto edge = edges.begin(); std::next(edge) != edges.end(); ++edge) {
    const Range heads{*edge, *std::next(edge)};
    std::vector<std::size_t> readers;
    std::set<int> ranks;
    for (const std::size_t n : numbers) {
      if (!schedule_.pieces()[n].heads.contains(heads)) continue;
      readers.push_back(n);
      ranks.insert(schedule_.pieces()[n].at);
    }
    if (ranks.size() < 2) continue;
    if (!made.empty() && made.back().heads.end == heads.begin && made.back().readers == readers) {
      made.back().heads.end = heads.end;
      continue;
    }
    Parcel& parcel = made.emplace_back();
    std::tie(parcel.owner, parcel.half, parcel.host) = key;
    parcel.heads = heads;
    parcel.readers = std::move(readers);
    // Ranks of the host take turns.
    const std::vector<int>& neighbours = problem_.hosts().ranks(problem_.hosts().of(owner));
    const auto turn = std::find(neighbours.begin(), neighbours.end(), owner) - neighbours.begin();
    parcel.courier = *std::next(ranks.begin(), (turn + half) % std::ssize(ranks));
  }
  for (Parcel& parcel : made) {
    std::vector<Range> rows;
    bool first = true;
    for (const std::size_t n : parcel.readers) {
      const Piece& piece = schedule_.pieces()[n];
      const Ranges some = half == 0 ? Ranges{piece.rows} : keys_of(problem_, piece);
      rows.insert(rows.end(), some.begin(), some.end());
      // As long before the first reader asks as readers ask before they compute.
      const Index posted = schedule_.posted(n, 2 * problem_.prefetch());
      parcel.fetched = first ? posted : std::min(parcel.fetched, posted);
      parcel.asked = std::max(parcel.asked, schedule_.posted(n, problem_.prefetch()));
      parcel.added = std::max(parcel.added, piece.end());
      first = false;
    }
    parcel.rows = union_of(std::move(rows));
    // The courier adds up one piece after the last sum was due, between two of its own.
    const auto own = schedule_.at(parcel.courier);
    auto next = std::find_if(own.begin(), own.end(),
                             [&](const Piece& p) { return p.end() >= parcel.added; });
    if (next != own.end() && std::next(next) != own.end()) ++next;
    if (next != own.end()) parcel.added = next->end();
    all_.push_back(std::move(parcel));
  }
}

std::vector<Cut> Parcels::cuts(std::size_t number, int half) const {
  const Range heads = schedule_.pieces()[number].heads;
  std::vector<Cut> cuts;
  Index from = heads.begin;
  const auto found = of_.find({number, half});
  if (found != of_.end()) {
    for (const std::size_t p : found->second) {
      const Parcel& parcel = all_[p];
      if (from < parcel.heads.begin) cuts.push_back({{from, parcel.heads.begin}});
      cuts.push_back({parcel.heads, &parcel});
      from = parcel.heads.end;
    }
  }
  if (from < heads.end) cuts.push_back({{from, heads.end}});
  return cuts;
}

}  // namespace dattn
