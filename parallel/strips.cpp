#include "parallel/strips.hpp"

#include <algorithm>
#include <utility>

#include "kernels/check.hpp"

namespace dattn {

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
    if (!joins) strips_.push_back({groups[g], packed, {}, {}, {}});
    strips_.back().heads.end = groups[g].end;
    if (!packed) continue;
    RingMembers& all = strips_.back().ring = {queries, g, {}, {}};
    for (const int r : ring_) {
      all.held.push_back(held_(queries ? Kind::Q : Kind::K, r, strips_.size() - 1).rows);
      all.ranks.push_back(stands_for ? stands_for(r) : std::vector<int>{r});
    }
    pack(strips_.back());
  }
}

std::size_t Strips::place(int places) const {
  const int count = members();
  return static_cast<std::size_t>(((here_ + places) % count + count) % count);
}

int Strips::member(int places) const { return ring_[place(places)]; }

void Strips::pack(Strip& strip) const {
  const int count = members();
  const RingRows& needed = problem_.ring_rows(strip.ring);
  strip.arriving.resize(static_cast<std::size_t>(count));
  strip.leaving.resize(static_cast<std::size_t>(count));
  for (int hop = 0; hop < count; ++hop) {
    const auto h = static_cast<std::size_t>(hop);
    if (hop + 1 < count) strip.leaving[h] = needed.needed_from(place(-hop), hop + 1);
    if (hop > 0) strip.arriving[h] = needed.needed_from(place(-hop), hop);
  }
}

Block Strips::block(const Block& all, const Strip& strip, const Ranges& rows) const {
  const Ranges heads =
      intersect(all.heads, Ranges{heads_touched(all.kind, strip.heads, problem_.shape())});
  return {all.kind, heads, strip.packed ? rows : all.rows};
}

Ranges Strips::needed_rows(const Strip& strip, int owner, int reader) const {
  if (!strip.packed) return {};
  return rows_needed(problem_, strip.ring, place(owner), place(reader));
}

Block Strips::arriving(Kind kind, std::size_t strip, int hop) const {
  const Strip& s = strips_[strip];
  const Block all = held_(kind, member(-hop), strip);
  return block(all, s, s.packed ? s.arriving[static_cast<std::size_t>(hop)] : all.rows);
}

Block Strips::leaving(Kind kind, std::size_t strip, int hop) const {
  const Strip& s = strips_[strip];
  const Block all = held_(kind, member(-hop), strip);
  return block(all, s, s.packed ? s.leaving[static_cast<std::size_t>(hop)] : all.rows);
}

Block Strips::needed(Kind kind, std::size_t strip, int hop) const {
  const Strip& s = strips_[strip];
  return block(held_(kind, member(-hop), strip), s, needed_rows(s, -hop, 0));
}

Block Strips::needed_of_own(Kind kind, std::size_t strip, int hop) const {
  const Strip& s = strips_[strip];
  return block(held_(kind, member(0), strip), s, needed_rows(s, 0, hop));
}

}  // namespace dattn
