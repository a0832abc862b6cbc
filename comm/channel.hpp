#pragma once

// Private to windows.cpp: what ranks of a host tell each other in shared memory.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "comm/host_memory.hpp"

namespace dattn::comm {

/// A strip in shared memory: its bytes are found from the Place that goes with it.
struct StripThere {
  std::int64_t offset;
  std::int64_t count;
  std::int64_t length;
  std::int64_t stride;
};

constexpr std::int64_t kStripsHere = 2;  // most messages have no more
constexpr std::uint64_t kEntries = 32;   // messages of a channel that the other side can see

/// A message as its sender tells it.
struct Entry {
  std::int64_t bytes;
  bool by_mpi;  // the bytes come through the Communicator
  bool lent;
  HostMemory::Place place;  // of the strips' bytes; offset 0
  std::int64_t count;       // of strips
  HostMemory::Place list;   // where the strips are written down, if they are too many for here
  std::array<StripThere, kStripsHere> strips;
};

/// The messages from one rank to another, in order. In the front of the sender.
struct Channel {
  alignas(64) std::atomic<std::uint64_t> told;   // entries written; the sender's
  alignas(64) std::atomic<std::uint64_t> taken;  // messages complete; the receiver's
  std::atomic<std::int64_t> viewed;              // bytes, of these
  std::atomic<std::int64_t> copied;
  alignas(64) std::array<Entry, kEntries> entries;
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

/// What every rank of the host sees of one; starts as zeros.
struct Front {
  std::uint64_t token;                            // HostMemory's
  alignas(64) std::atomic<std::uint64_t> rounds;  // give_back() so often

  /// To which member.
  Channel& to(int member) {
    return reinterpret_cast<Channel*>(reinterpret_cast<std::byte*>(this) + sizeof(Front))[member];
  }
  static std::int64_t bytes(std::size_t members) {
    return static_cast<std::int64_t>(sizeof(Front) + members * sizeof(Channel));
  }
};

}  // namespace dattn::comm
