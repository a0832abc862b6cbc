#pragma once

#include "parallel/moves.hpp"
#include "parallel/strategies.hpp"

namespace dattn {

/// Tokens are exchanged for heads: each rank computes some heads over all tokens.
Strategy ulysses_strategy();

/// What a group of ranks holds before the exchange (each its rows, all heads) and after it (all
/// rows of the group, some heads), by member. Query heads are those of Problem::placement(); of
/// keys and values those that these read, so that a head is replicated where members share it.
struct Exchange {
  std::vector<Block> by_token;
  std::vector<Block> by_head;
};
Exchange exchange(const Problem& problem, Kind kind, const std::vector<int>& group);
/// The same of some query heads only, `heads` by member.
Exchange exchange(const Problem& problem, Kind kind, const std::vector<int>& group,
                  const std::vector<Ranges>& heads);

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
