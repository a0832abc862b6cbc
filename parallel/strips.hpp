#pragma once

#include <functional>
#include <vector>

#include "parallel/block.hpp"
#include "parallel/problem.hpp"
#include "parallel/ring_rows.hpp"

namespace dattn {

/// The Block of a kind that a member of a ring starts with.
using Held = std::function<Block(Kind, int member)>;
/// The same of one strip.
using HeldOfStrip = std::function<Block(Kind, int member, std::size_t strip)>;
/// The ranks whose queries and keys a member of a ring has: only its own, where this is empty.
using StandsFor = std::function<std::vector<int>(int member)>;

/// What goes around a ring, cut between heads, as one member sees it.
///
/// Head groups that see as much as under a causal mask (Problem::is_sparse) are one strip, which
/// goes around whole. Every other head group is a strip of its own, and packed: on each hop it has
/// just those rows of what its owner started with that the member or one further on needs; where
/// nobody does, nothing goes on. All of it is arithmetic on the mask, so that both ends of a
/// message agree without another one.
///
/// A member counts hops from its own: what is at hop h comes from the member h places to its left.
class Strips {
 public:
  /// Of the side of keys or, with `queries`, of that of queries. @pre `problem` outlives this
  Strips(const Problem& problem, const std::vector<int>& ring, int rank, bool queries, Held held,
         const StandsFor& stands_for);
  /// The same where members start with strips that have been packed before.
  Strips(const Problem& problem, const std::vector<int>& ring, int rank, bool queries,
         HeldOfStrip held, const StandsFor& stands_for);

  std::size_t count() const { return strips_.size(); }
  bool packed(std::size_t strip) const { return strips_[strip].packed; }
  int members() const { return static_cast<int>(ring_.size()); }
  /// The rank `places` to the right of this one.
  int member(int places) const;

  /// What comes from the left for hop `hop`. @pre 0 < hop < members()
  Block arriving(Kind kind, std::size_t strip, int hop) const;
  /// What goes on to the right of what is here at hop `hop`. @pre 0 <= hop < members() - 1
  Block leaving(Kind kind, std::size_t strip, int hop) const;
  /// Of what is here at hop `hop` what this member itself needs: all of it, if not packed.
  Block needed(Kind kind, std::size_t strip, int hop) const;
  /// Of this member's own what the member `hop` places to the right needs, to which it comes at
  /// that one's hop `hop`.
  Block needed_of_own(Kind kind, std::size_t strip, int hop) const;

 private:
  struct Strip {
    Range heads;  ///< of queries
    bool packed = false;
    // Where packed: rows by hop, and what rows single members need is found in.
    std::vector<Ranges> arriving, leaving;
    RingMembers ring;
  };

  void pack(Strip& strip) const;
  /// The place of the member `places` to the right of this one.
  std::size_t place(int places) const;
  /// Of `all` the heads of a strip, and if it is packed these rows.
  Block block(const Block& all, const Strip& strip, const Ranges& rows) const;
  /// The rows of one member that another needs, by their places to the right of this one; none, if
  /// the strip is not packed.
  Ranges needed_rows(const Strip& strip, int owner, int reader) const;

  const Problem& problem_;
  std::vector<int> ring_;
  int here_;
  HeldOfStrip held_;
  std::vector<Strip> strips_;
};

}  // namespace dattn
