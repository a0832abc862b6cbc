#include "parallel/ring_rows.hpp"

#include <algorithm>

#include "parallel/problem.hpp"

namespace dattn {
namespace {

/// Those of `rows` that stand at `positions`.
Ranges rows_within(const Partition& tokens, const Ranges& rows, const Ranges& positions) {
  Ranges out;
  int last = -1;
  Ranges there;  // of all rows of the last rank, which many Ranges may be parts of
  for (Range left : rows) {
    while (!left.empty()) {
      const int rank = tokens.owner(left.begin);
      if (rank != last) there = tokens.rows_at(rank, positions);
      last = rank;
      const Range here = intersect(left, tokens.rows(rank));
      for (const Range found : intersect(Ranges{here}, there)) append(out, found);
      left.begin = here.end;
    }
  }
  return out;
}

/// Adds `more` to `all`, ascending; whether that was anything new.
bool unite(Ranges& all, const Ranges& more) {
  const auto known = [&](Range some) {
    const auto behind = std::upper_bound(all.begin(), all.end(), some.begin,
                                         [](Index at, const Range& r) { return at < r.end; });
    return behind != all.end() && behind->contains(some);
  };
  if (std::all_of(more.begin(), more.end(), known)) return false;
  std::vector<Range> both(all.begin(), all.end());
  both.insert(both.end(), more.begin(), more.end());
  all = union_of(std::move(both));
  return true;
}

}  // namespace

RingRows::RingRows(const Problem& problem, const RingMembers& ring) : all_(ring.held.size()) {
  const std::size_t members = ring.held.size();
  for (std::size_t owner = 0; owner < members; ++owner) {
    Ranges rows;
    for (std::size_t places = members - 1; places > 0; --places) {
      const std::size_t reader = (owner + places) % members;
      if (!unite(rows, rows_needed(problem, ring, owner, reader))) continue;
      all_[owner].emplace_back(static_cast<int>(places), intersect(ring.held[owner], rows));
    }
  }
}

const Ranges& RingRows::needed_from(std::size_t owner, int places) const {
  static const Ranges kNone;
  const Growth& growth = all_[owner];
  const auto behind = std::partition_point(
      growth.begin(), growth.end(), [&](const auto& further) { return further.first >= places; });
  return behind == growth.begin() ? kNone : (behind - 1)->second;
}

Ranges rows_needed(const Problem& problem, const RingMembers& ring, std::size_t owner,
                   std::size_t reader) {
  const Partition& tokens = ring.queries ? problem.queries() : problem.keys();
  const auto of = [&](int rank) {
    return rows_within(tokens, ring.held[owner],
                       ring.queries ? problem.queries_needed(rank, ring.group)
                                    : problem.keys_needed(rank, ring.group));
  };
  const std::vector<int>& ranks = ring.ranks[reader];
  if (ranks.size() == 1) return of(ranks.front());
  Ranges all;
  for (const int rank : ranks) unite(all, of(rank));
  return intersect(ring.held[owner], all);
}

}  // namespace dattn
