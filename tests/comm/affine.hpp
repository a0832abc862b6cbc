#pragma once

// Records whose combination is exact and does not commute: x -> a x + b modulo a prime, composed.

#include <cstdint>
#include <cstring>
#include <vector>

#include "comm/operation.hpp"

namespace dattn::comm {

struct Affine {
  std::uint32_t a;
  std::uint32_t b;
  std::uint32_t records_seen;  // how many were combined; makes an omission visible by itself
  bool operator==(const Affine&) const = default;
};

inline Affine after(const Affine& first, const Affine& second) {
  constexpr std::uint64_t kPrime = 4294967291U;
  const auto times = [](std::uint64_t x, std::uint64_t y) { return x * y % kPrime; };
  return {static_cast<std::uint32_t>(times(first.a, second.a)),
          static_cast<std::uint32_t>((times(first.b, second.a) + second.b) % kPrime),
          first.records_seen + second.records_seen};
}

inline void compose(const std::byte* in, std::byte* inout, std::int64_t records,
                    std::int64_t record_bytes) {
  for (std::int64_t i = 0; i < records; ++i) {
    Affine low;
    Affine high;
    std::memcpy(&low, in + i * record_bytes, sizeof low);
    std::memcpy(&high, inout + i * record_bytes, sizeof high);
    high = after(low, high);
    std::memcpy(inout + i * record_bytes, &high, sizeof high);
  }
}

/// What `rank` brings: `count` records, all different.
inline std::vector<Affine> affine_records(int rank, std::size_t count) {
  std::vector<Affine> out;
  for (std::size_t i = 0; i < count; ++i) {
    const auto seed = static_cast<std::uint32_t>(rank + 1) * 7919U + static_cast<std::uint32_t>(i);
    out.push_back({seed * 2654435761U % 1000003U + 2U, seed % 65521U, 1U});
  }
  return out;
}

/// The records of ranks 0, 1, ... combined in this order.
inline std::vector<Affine> composed(int ranks, std::size_t count) {
  std::vector<Affine> out = affine_records(0, count);
  for (int r = 1; r < ranks; ++r) {
    const std::vector<Affine> next = affine_records(r, count);
    for (std::size_t i = 0; i < count; ++i) out[i] = after(out[i], next[i]);
  }
  return out;
}

}  // namespace dattn::comm
