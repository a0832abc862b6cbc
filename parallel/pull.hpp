#pragma once

#include "parallel/moves.hpp"

namespace dattn {

/// pull() and pull_backward() for whichever side is to be fetched: what the own pairs need of
/// another rank comes from it, stage by stage, nearest ranks first, and, backward, what they give
/// to it goes back.
///
/// Where the Problem relays, what several ranks of a host need of a rank on another one goes there
/// once. One of them, the courier, fetches all of it, passes to each other one what that needs,
/// when it needs it, and sums up what they give back before that goes home as one. Couriers take
/// turns, so that the ranks of a host share the work. Which pairs a rank computes and in which
/// order does not change, so that O and LSE have the bits of a plan for one host; sums of gradients
/// are added up in another order.
///
/// `mine` are the slots of the rank's own shards; forward only q, k, v count, and `out`.
void pull_side(Writer& me, Pass pass, const Side& side, const AttendBackward& mine, SlotId out);

}  // namespace dattn
