#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "comm/memory.hpp"

namespace dattn::comm {

/// Memory of one rank that the other ranks of its host can see, and theirs: a file in memory a
/// rank, which has no name and is gone with the last process that has it, however that ends. Peers
/// map each other's memory when they first look at it. Linux.
class HostMemory {
 public:
  /// Some bytes of a member's memory, as any member can say it to any other: `bytes` from `begin`
  /// are what was allocated together, `offset` counts from there.
  struct Place {
    std::int64_t member = 0;
    std::int64_t begin = 0;
    std::int64_t bytes = 0;
    std::int64_t offset = 0;
  };

  /// Makes this rank's file; its first `front` bytes are 0, but for what this class keeps in the
  /// first 8. Throws std::system_error.
  explicit HostMemory(std::int64_t front);
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  ~HostMemory();

  /// What a peer needs to find this file.
  std::string name() const;
  /// Opens the files of all members, of which this rank is `self`. Throws std::runtime_error or
  /// std::system_error where one cannot be reached.
  void open(const std::vector<std::string>& names, int self);

  /// A member's front, which every member may write.
  std::byte* front(int member);

  /// Memory that peers can see, zeros; pages come on the NUMA node of who first touches them. It is
  /// given back to the host when its owner is done with it, and outlives this object.
  Memory allocate(std::int64_t bytes);

  /// Where bytes of this process lie, if they are a member's memory.
  std::optional<Place> find(const std::byte* data, std::int64_t bytes) const;
  /// Where `place` begins in this process. Throws std::system_error.
  const std::byte* at(const Place& place);

 private:
  struct Own;
  struct Peer {
    int file = -1;
    std::byte* front = nullptr;
    std::map<std::pair<std::int64_t, std::int64_t>, const std::byte*> mapped;  // (begin, bytes)
  };

  std::shared_ptr<Own> own_;
  std::int64_t front_bytes_;
  int self_ = 0;
  std::vector<Peer> peers_;
  std::map<const std::byte*, Place> seen_;  // of peers, by where it begins here
};

}  // namespace dattn::comm
