#pragma once

#include "parallel/moves.hpp"
#include "parallel/strategies.hpp"

namespace dattn {

/// Tokens are exchanged for heads: each rank computes some heads over all tokens.
Strategy ulysses_strategy();

/// The heads that member `member` of a group of `members` computes, as they bear on `kind`: query
/// heads in parts that differ by one at most; of keys and values those that these query heads read,
/// so that a head is replicated where the group is larger than their number or cuts unevenly.
Range heads_of_member(const Shape& shape, Kind kind, int members, int member);

/// What a group of ranks holds before the exchange (each its rows, all heads) and after it (all
/// rows of the group, some heads), by member.
struct Exchange {
  std::vector<Block> by_token;
  std::vector<Block> by_head;
};
Exchange exchange(const Problem& problem, Kind kind, const std::vector<int>& group);

/// Ulysses within `group`, whatever happens by head: Q, K and V go to heads, `attend` is told their
/// slots and that of their Partial, and the Partial goes back to tokens. Where the Problem keeps,
/// Q, K and V by head are kept for the backward pass; `attend` must leave them as they are.
Program within_heads(const Problem& problem, int rank, const std::vector<int>& group,
                     const std::function<void(Writer&, const Inputs&, SlotId out)>& attend);

/// Its backward pass: Q, K, V (unless they were kept), dO and Stats go to heads, `attend` is told
/// their slots and those of their gradients, and these go back to tokens, added up where members
/// share a key or value head.
Program within_heads_backward(const Problem& problem, int rank, const std::vector<int>& group,
                              const std::function<void(Writer&, const AttendBackward&)>& attend);

}  // namespace dattn
