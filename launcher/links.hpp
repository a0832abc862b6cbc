#pragma once

#include <optional>

#include "comm/communicator.hpp"
#include "parallel/hosts.hpp"
#include "parallel/machine.hpp"

namespace dattn {

/// Collective: which ranks share a host, by the names that MPI has for the hosts; the same answer
/// on all ranks.
Hosts hosts_of(comm::Communicator& world);

/// What messages take, of each class of links that this job has.
struct Links {
  std::optional<Link> inside;   ///< of a rank to ranks of its host, all at once
  std::optional<Link> between;  ///< of a host to others, all its ranks together
};

/// Collective: measures links by exchanges around rings of ranks, inside hosts and between them.
/// Takes some ten messages of up to a MiB a rank; the same answer on all ranks.
Links measure_links(comm::Communicator& world, const Hosts& hosts);

/// Collective: the part of a message's time, 0 to 1, that is gone when the kernel behind which it
/// was sent is over, twice as long as the message by itself; of each class of links. `threads` a
/// rank.
struct Overlap {
  std::optional<double> inside, between;
};
Overlap overlap_of_links(comm::Communicator& world, const Hosts& hosts, const Links& links,
                         int threads);

}  // namespace dattn
