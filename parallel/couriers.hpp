#pragma once

#include <map>
#include <vector>

#include "parallel/block.hpp"
#include "parallel/problem.hpp"

namespace dattn {

/// How a tensor passes between those who own some of its rows, each with all heads, and those who
/// work on some of its heads, each with all rows: straight, but where the Problem relays and
/// several members of a host have the same heads of an owner elsewhere. There one of them, the
/// courier, stands for the others: those heads pass between owner and host once, and on between the
/// courier and the others. Ranks of a host take turns as couriers, by owner.
class Couriers {
 public:
  /// By member of the group what it owns and what it works on. Both outlive this.
  Couriers(const Problem& problem, const std::vector<int>& group, const std::vector<Block>& owned,
           const std::vector<Block>& worked_on);

  /// What passes straight between an owner and a member who works on it; of a courier what it
  /// stands for is part of it.
  const Block& straight(std::size_t owner, std::size_t member);

  /// What passes between a member and its courier.
  struct Hop {
    std::size_t courier = 0;
    std::size_t member = 0;
    Block block;
  };
  /// Of an owner's, those on the host of `member`, in an order that all agree on.
  const std::vector<Hop>& hops(std::size_t owner, std::size_t member);
  /// Whether `member` is a courier of the owner.
  bool stands_for_others(std::size_t owner, std::size_t member);

 private:
  struct Host {
    std::vector<std::size_t> members;
    std::map<std::size_t, Block> straight;  ///< by member
    std::vector<Hop> hops;
  };
  /// Whether the two are on different hosts and these may have couriers.
  bool relayed(std::size_t owner, std::size_t member) const;
  /// @pre relayed
  Host& between(std::size_t owner, std::size_t member);
  void share(std::size_t owner, Host& host) const;
  int host_of(std::size_t member) const { return problem_.hosts().of(group_[member]); }

  const Problem& problem_;
  const std::vector<int>& group_;
  const std::vector<Block>& owned_;
  const std::vector<Block>& worked_on_;
  std::map<int, std::vector<std::size_t>> members_;             ///< by host
  std::map<std::pair<std::size_t, int>, Host> found_;           ///< by owner and host
  std::map<std::pair<std::size_t, std::size_t>, Block> alone_;  ///< of all others, by both
};

}  // namespace dattn
