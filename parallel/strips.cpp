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
    if (!joins) strips_.push_back({groups[g], packed, {}, {}, {}, {}});
    strips_.back().heads.end = groups[g].end;
    if (!packed) continue;
    RingMembers all{queries, g, {}, {}};
    for (const int r : ring_) {
      all.held.push_back(held_(queries ? Kind::Q : Kind::K, r, strips_.size() - 1).rows);
      all.ranks.push_back(stands_for ? stands_for(r) : std::vector<int>{r});
    }
    pack(strips_.back(), all);
  }
}

int Strips::member(int places) const {
  const int count = members();
  return ring_[static_cast<std::size_t>(((here_ + places) % count + count) % count)];
}

void Strips::pack(Strip& strip, const RingMembers& all) const {
  const int count = members();
  const auto place = [&](int places) {
    return static_cast<std::size_t>(((here_ + places) % count + count) % count);
  };
  const RingRows& needed = problem_.ring_rows(all);
  const auto rows = [&](int owner, int reader) {
    return rows_needed(problem_, all, place(owner), place(reader));
  };
  for (auto* by_hop : {&strip.arriving, &strip.leaving, &strip.needed, &strip.needed_of_own}) {
    by_hop->resize(static_cast<std::size_t>(count));
  }
  for (int hop = 0; hop < count; ++hop) {
    const auto h = static_cast<std::size_t>(hop);
    if (hop + 1 < count) strip.leaving[h] = needed.needed_from(place(-hop), hop + 1);
    if (hop == 0) continue;
    strip.arriving[h] = needed.needed_from(place(-hop), hop);
    strip.needed[h] = rows(-hop, 0);
    strip.needed_of_own[h] = rows(0, hop);
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

}  // namespace dattn
