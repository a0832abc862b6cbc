#pragma once

#include <vector>

#include "kernels/range.hpp"
#include "parallel/hosts.hpp"
#include "parallel/machine.hpp"

namespace dattn {

/// When links are free, as messages take them one after the other: a rank's to others of its host,
/// and that of a host to other hosts, which its ranks share. Each sends one message at a time and
/// receives one.
class LinkTimes {
 public:
  /// `machine` and `hosts` must outlive this.
  LinkTimes(const Machine& machine, const Hosts& hosts, int ranks);

  /// Takes the links between two ranks for so many bytes, as soon as both ends are posted and the
  /// links free; gives the seconds when all have arrived. What has no bytes takes none.
  double arrival(int from, int to, double posted, Index bytes);

 private:
  struct Ends {
    double out_free = 0;
    double in_free = 0;
  };
  Ends& host_of(int rank) { return of_hosts_[static_cast<std::size_t>(hosts_.of(rank))]; }

  const Machine& machine_;
  const Hosts& hosts_;
  std::vector<Ends> of_ranks_;
  std::vector<Ends> of_hosts_;
};

}  // namespace dattn
