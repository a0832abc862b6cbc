#pragma once

#include <vector>

#include "kernels/range.hpp"
#include "parallel/hosts.hpp"
#include "parallel/machine.hpp"

namespace dattn {

/// Who sends which records to whom so that all ranks of a group get the sum of the records that
/// each of them has: an all-reduce as plans count it and AllReduce does it.
///
/// On one host it is the library's, counted as ours: about 2 (P-1)/P of the records by each rank,
/// the least there is. Each rank of a host owns a slice of the records. Inside a host every slice is
/// summed up by its owner, between hosts owners of the same records sum up what their hosts have,
/// and inside hosts every slice goes to all again. From host to host so go 2 (H-1) times the records
/// in all, and 2 (P-1) times in all of the group, however many ranks a host has; each slice is cut
/// into one part for each host, which sums it up and returns it, but two hosts exchange theirs
/// whole: as many bytes, one latency less.
/// Sums are made in the order of hosts, on each in the order of ranks: the same bits on all ranks,
/// whenever messages come.
class Reduction {
 public:
  /// `group` are the ranks, in the order of their axis. With `own_messages` it is by messages of
  /// ours on one host, too.
  Reduction(const std::vector<int>& group, const Hosts& hosts, Index records,
            bool own_messages = false);

  /// Whether the group is on several hosts.
  bool across() const { return sizes_.size() > 1; }
  /// Whether it is by messages of ours. What follows about rounds and scratch is of these only.
  bool by_messages() const { return across() || own_messages_; }

  /// Each is over for a rank when all that it sends and receives in it is there.
  enum class Round { sum_inside, sum_between, share_between, share_inside };
  static constexpr Round kRounds[] = {Round::sum_inside, Round::sum_between, Round::share_between,
                                      Round::share_inside};

  /// Records that member `from` sends to member `to` (places in the group) in a round, in one
  /// message.
  Ranges sent(Round round, int from, int to) const;
  /// The slice of a member, and the part of it that it sums up over hosts.
  Ranges slice(int member) const;
  Ranges part(int member) const;
  /// Members, host by host in the order of the group.
  const std::vector<std::vector<int>>& by_host() const { return by_host_; }
  /// Which of these hosts a member is on.
  int host_of(int member) const { return host_of_[static_cast<std::size_t>(member)]; }

  /// Records that a member sends in all, and of these to members on a host (one of by_host()).
  Index sent_by(int member) const;
  Index sent_to(int member, int host) const;
  /// Records that a member must have room for beside its own: what the others of its host, or other
  /// hosts, have of its slice. Where it is the library's none, which has its own memory.
  Index scratch(int member) const;
  /// Messages that a member sends and receives in a round, at most.
  Index messages(int member) const;

  /// What it takes from when the last member begins, each record of `record_bytes`.
  double seconds(const Machine& machine, Index record_bytes) const;

 private:
  Index members() const { return static_cast<Index>(host_of_.size()); }
  /// Two hosts exchange their slices whole.
  bool exchanges() const { return sizes_.size() == 2; }
  Range part_of(int host) const;
  Index size_of(int host) const { return sizes_[static_cast<std::size_t>(host)]; }
  Range cut(Range records, int member) const;

  Index records_;
  bool own_messages_;
  std::vector<std::vector<int>> by_host_;
  std::vector<Index> sizes_;  ///< of these
  std::vector<int> host_of_;  ///< by member
  std::vector<int> place_;    ///< by member: which of its host
};

}  // namespace dattn
