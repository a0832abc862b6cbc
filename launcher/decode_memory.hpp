#pragma once

#include "comm/communicator.hpp"
#include "launcher/decode_options.hpp"
#include "parallel/planner.hpp"

namespace dattn {

/// How the ranks of a job of decoding stand, and what this one needs.
struct DecodePlace {
  Mesh mesh;
  Needs needs;
};

/// Collective: the mesh of the job, whose ranks are on `hosts`, and the memory of each rank.
/// Failure(usage) where the form does not suit the ranks, Failure(memory) where they need more than
/// --memory or their hosts have; before anything is allocated.
DecodePlace settle_decoding(comm::Communicator& world, const DecodeOptions& options,
                            const Hosts& hosts);

}  // namespace dattn
