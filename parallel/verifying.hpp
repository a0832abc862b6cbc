#pragma once

#include "parallel/plan.hpp"

/// What it takes of a rank's memory to verify messages (EngineOptions::verify_wire): arithmetic on
/// Programs, since plans count no Envelope.
namespace dattn {

/// Of an Envelope, which goes beside a message.
inline constexpr Index kEnvelopeBytes = 128;

/// Of the Envelopes of a Program's Sends and Recvs: one a step, with the numbers that are due, and
/// the messages so far from and to each rank up to the last that it meets.
Index envelope_bytes(const Program& program);

/// Of what an all-reduce of ours takes on a member, each record of `record_bytes`: what others have
/// of its slice, and the Envelopes of a round.
Index verified_bytes(const Reduction& how, int member, Index record_bytes);

/// Of all that an Engine takes to verify a Program's messages beside what it takes without.
Index verifying_bytes(const Program& program, const Problem& problem);

}  // namespace dattn
