#include "parallel/strips.hpp"

#include <algorithm>
#include <utility>

#include "kernels/check.hpp"

namespace dattn {
namespace {

/// Those of `rows` that stand at `positions`.
Ranges rows_within(const Partition& tokens, const Ranges& rows, const Ranges& positions) {
  Ranges out;
  for (Range left : rows) {
    while (!left.empty()) {
      const int rank = tokens.owner(left.begin);
      const Range here = intersect(left, tokens.rows(rank));
      for (const Range found : tokens.rows_at(rank, positions)) append(out, intersect(found, here));
      left.begin = here.end;
    }
  }
  return out;
}

/// `all` with `more`, both ascending.
void unite(Ranges& all, const Ranges& more) {
  const auto known = [&](Range some) {
    const auto behind = std::upper_bound(all.begin(), all.end(), some.begin,
                                         [](Index at, const Range& r) { return at < r.end; });
    return behind != all.end() && behind->contains(some);
  };
  if (std::all_of(more.begin(), more.end(), known)) return;
  std::vector<Range> both(all.begin(), all.end());
  both.insert(both.end(), more.begin(), more.end());
  all = union_of(std::move(both));
}

}  // namespace

Strips::Strips(const Problem& problem, const std::vector<int>& ring, int rank, bool queries,
               Held held, const StandsFor& stands_for)
    : Strips(
          problem, ring, rank, queries,
          [held = std::move(held)](Kind kind, int member, std::size_t) {
            return held(kind, member);
          },
          stands_for) {}

Strips::Strips(const Problem& problem, const std::vector<int>& ring, int rank, bool queries,
               HeldOfStrip held, const StandsFor& stands_for)
    : problem_(problem), ring_(ring), held_(std::move(held)) {
  const auto found = std::find(ring_.begin(), ring_.end(), rank);
  CHECK(found != ring_.end(), rank);
  here_ = static_cast<int>(found - ring_.begin());
  const auto& groups = problem.head_groups();
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const bool packed = problem.is_sparse(g);
    const bool joins = !strips_.empty() && !strips_.back().packed && !packed;
    if (!joins) strips_.push_back({groups[g], packed, {}, {}, {}, {}, {}});
    strips_.back().heads.end = groups[g].end;
    if (packed) pack(strips_.size() - 1, g, queries, stands_for);
  }
}

int Strips::member(int places) const {
  const int count = members();
  return ring_[static_cast<std::size_t>(((here_ + places) % count + count) % count)];
}

void Strips::pack(std::size_t at, std::size_t group, bool queries, const StandsFor& stands_for) {
  Strip& strip = strips_[at];
  const int count = members();
  const Partition& tokens = queries ? problem_.queries() : problem_.keys();
  const Kind kind = queries ? Kind::Q : Kind::K;
  const auto need = [&](int places) {
    const int reader = member(places);
    Ranges all;
    for (const int r : stands_for ? stands_for(reader) : std::vector<int>{reader}) {
      unite(all, queries ? problem_.queries_needed(r, group) : problem_.keys_needed(r, group));
    }
    return all;
  };
  const auto rows = [&](int owner, const Ranges& positions) {
    return rows_within(tokens, held_(kind, member(owner), at).rows, positions);
  };
  // A shard that is at hop h visits this member and those up to the one before its owner. So the
  // larger h, the fewer: readers come in one by one.
  for (auto* all :
       {&strip.arriving, &strip.leaving, &strip.needed, &strip.needed_of_own, &strip.wanted}) {
    all->resize(static_cast<std::size_t>(count));
  }
  Ranges from_here;
  Ranges behind;
  const Ranges own = need(0);
  for (int hop = count - 1; hop >= 0; --hop) {
    const auto h = static_cast<std::size_t>(hop);
    const int last = count - 1 - hop;  // places to the right of the last reader
    if (last > 0) unite(behind, need(last));
    if (hop + 1 < count) strip.leaving[h] = rows(-hop, behind);
    if (hop == 0) break;
    unite(from_here, last == 0 ? own : need(last));
    strip.wanted[h] = from_here;
    strip.arriving[h] = rows(-hop, from_here);
    strip.needed[h] = rows(-hop, own);
    strip.needed_of_own[h] = rows(0, need(hop));
  }
}

Block Strips::block(const Block& all, const Strip& strip, const std::vector<Ranges>& rows,
                    int hop) const {
  const Ranges heads =
      intersect(all.heads, Ranges{heads_touched(all.kind, strip.heads, problem_.shape())});
  return {all.kind, heads, strip.packed ? rows[static_cast<std::size_t>(hop)] : all.rows};
}

Block Strips::arriving(Kind kind, std::size_t strip, int hop) const {
  return block(held_(kind, member(-hop), strip), strips_[strip], strips_[strip].arriving, hop);
}

Block Strips::leaving(Kind kind, std::size_t strip, int hop) const {
  return block(held_(kind, member(-hop), strip), strips_[strip], strips_[strip].leaving, hop);
}

Block Strips::needed(Kind kind, std::size_t strip, int hop) const {
  return block(held_(kind, member(-hop), strip), strips_[strip], strips_[strip].needed, hop);
}

Block Strips::needed_of_own(Kind kind, std::size_t strip, int hop) const {
  return block(held_(kind, member(0), strip), strips_[strip], strips_[strip].needed_of_own, hop);
}

Block Strips::arriving_beside(const Block& held, std::size_t strip, int hop) const {
  const Strip& s = strips_[strip];
  Block all = block(held, s, s.arriving, hop);
  if (!s.packed) return all;
  const Partition& tokens = of_queries(held.kind) ? problem_.queries() : problem_.keys();
  all.rows = rows_within(tokens, held.rows, s.wanted[static_cast<std::size_t>(hop)]);
  return all;
}

}  // namespace dattn
