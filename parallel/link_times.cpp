#include "parallel/link_times.hpp"

#include <algorithm>

namespace dattn {

LinkTimes::LinkTimes(const Machine& machine, const Hosts& hosts, int ranks)
    : machine_(machine),
      hosts_(hosts),
      of_ranks_(static_cast<std::size_t>(ranks)),
      of_hosts_(static_cast<std::size_t>(hosts.count())) {}

double LinkTimes::arrival(int from, int to, double posted, Index bytes) {
  if (bytes == 0) return posted;
  const bool inside = hosts_.together(from, to);
  const Link link = inside ? machine_.inside() : machine_.between();
  double& out_free = (inside ? of_ranks_[static_cast<std::size_t>(from)] : host_of(from)).out_free;
  double& in_free = (inside ? of_ranks_[static_cast<std::size_t>(to)] : host_of(to)).in_free;
  const double start = std::max({posted, out_free, in_free});
  const double wire = static_cast<double>(bytes) / link.bandwidth;
  out_free = in_free = start + wire;
  return start + link.latency + wire;
}

}  // namespace dattn
