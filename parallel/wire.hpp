#pragma once

#include <functional>

#include "comm/strip.hpp"
#include "kernels/range.hpp"

/// Sums between memory, where they are float32, and a message in bfloat16.
namespace dattn {

/// One (row, head) of a sum: `numbers` floats, the first `kept` of which stay floats.
struct RoundedRecord {
  Index numbers = 0;
  Index kept = 0;
};

/// The records that `from` covers, one after the other, into `into`: rounded to nearest, ties to
/// even. Calls `poll` now and then, as does widen(). @pre pieces of strips are whole records
void round(const comm::ConstStrips& from, const RoundedRecord& record, std::byte* into,
           const std::function<void()>& poll);

/// The way back.
void widen(const std::byte* from, const RoundedRecord& record, const comm::Strips& into,
           const std::function<void()>& poll);

}  // namespace dattn
