#pragma once

#include "parallel/decoder.hpp"

namespace dattn {

/// The positions of a rank among these of the cache: every P-th, as decoding's partition deals
/// them.
Run own_positions(Range keys, int ranks, int rank);

/// Who computes which pairs of a prefill: the tokens of all stretches of `lengths`, one behind the
/// other, dealt as the cache deals them, each of which sees the prefixes of its sequences and its
/// stretch up to itself. One head stands for all, which see the same; K is what the ranks move,
/// `numbers` a token, and V what is made of it where it has come. @pre there is a token
Problem prefill_problem(const Decoding& decoding, std::span<const Index> lengths, Index numbers,
                        int ranks, const Hosts& hosts);

/// K goes once around the ring of all ranks, those of a host side by side, while each rank attends
/// with the queries of its own tokens. If it `keeps`, each Block that comes has a home of its own,
/// where the Attends find it again when they are repeated without the messages; else two take
/// turns.
Program prefill_program(const Problem& problem, int rank, bool keeps);

/// The Programs of all ranks, proved. Throws std::logic_error with the Fault if they do not stand.
Plan prefill_plan(const Problem& problem, bool keeps);

}  // namespace dattn
