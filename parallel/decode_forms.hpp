#pragma once

#include "parallel/strategies.hpp"

namespace dattn {

/// Ways to split a step of decoding: few queries, all of them known to all ranks, against keys and
/// values of a cache. Forward only (Strategy::backward is null). @pre problem.cached()
///
/// A Program starts with K and V as its rank's part of the cache is to hold them, and with the
/// queries that the rank has made. It delivers whole heads of O, different ones on each rank, since
/// what comes next (W_UV, W_O) is split by heads; some ranks have none where ranks outnumber heads.
std::span<const Strategy> decode_forms();

/// The Program of `sequence` up to where Partials would be merged: it delivers those of all heads,
/// over the rank's own keys. What a plan of `sequence` proves of these Steps holds here as well.
/// @pre the mesh has a column for all heads
Program partials_program(const Problem& problem, int rank);

/// The form of this name, or null.
const Strategy* find_decode_form(std::string_view name);

}  // namespace dattn
