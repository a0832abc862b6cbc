#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "parallel/block.hpp"

namespace dattn {

class Problem;

/// The members of a ring, by their places in it: what they start with of a head group that is
/// packed (Problem::is_sparse), and for whom. Members of several rings that hold and need the same
/// are one.
struct RingMembers {
  bool queries = false;                 ///< rows of queries go around; else those of keys
  std::size_t group = 0;                ///< of Problem::head_groups()
  std::vector<Ranges> held;             ///< of those rows what each member starts with
  std::vector<std::vector<int>> ranks;  ///< the ranks whose queries and keys each member has

  friend auto operator<=>(const RingMembers&, const RingMembers&) = default;
};

/// What of a member's rows is needed how far around its ring. It is the same whoever asks:
/// Problem::ring_rows() finds it once for all ranks.
class RingRows {
 public:
  RingRows(const Problem& problem, const RingMembers& ring);

  /// The rows of the member at place `owner` that the one `places` further on, or any behind that
  /// one and before `owner`, needs; in the order that the owner holds them in. @pre places > 0
  const Ranges& needed_from(std::size_t owner, int places) const;

 private:
  /// What is needed by those so many places on, the furthest first; only where it grows.
  using Growth = std::vector<std::pair<int, Ranges>>;
  std::vector<Growth> all_;  ///< [owner]
};

/// The rows of member `owner` that member `reader` needs, in the order that the owner holds them.
Ranges rows_needed(const Problem& problem, const RingMembers& ring, std::size_t owner,
                   std::size_t reader);

}  // namespace dattn
