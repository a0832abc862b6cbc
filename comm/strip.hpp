#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace dattn::comm {

/// Bytes to be read: `count` pieces of `length` bytes, each `stride` bytes after the one before.
/// Precondition wherever strips are taken: count >= 0, length >= 0, and stride >= length when there
/// is more than one piece; functions throw std::invalid_argument otherwise.
struct ConstStrip {
  const std::byte* data = nullptr;
  std::int64_t count = 0;
  std::int64_t length = 0;
  std::int64_t stride = 0;
};

/// Bytes to be written or read; otherwise as ConstStrip.
struct Strip {
  std::byte* data = nullptr;
  std::int64_t count = 0;
  std::int64_t length = 0;
  std::int64_t stride = 0;

  operator ConstStrip() const { return {data, count, length, stride}; }
};

/// One message's bytes, in the order of the wire.
using Strips = std::vector<Strip>;
using ConstStrips = std::vector<ConstStrip>;

/// The one strip that is these bytes.
Strips strips_of(std::span<std::byte> bytes);
ConstStrips strips_of(std::span<const std::byte> bytes);

/// The same strips, for reading.
ConstStrips read_only(const Strips& strips);

/// The bytes that the strips cover together.
std::int64_t total(const Strips& strips);
std::int64_t total(const ConstStrips& strips);

/// The strips that cover bytes [begin, end) of the stream that `strips` are, in the fewest strips:
/// no empty ones, neighbours joined, and count == 1 exactly for a contiguous one.
/// Precondition: 0 <= begin <= end <= total(strips), else std::invalid_argument.
Strips cut(const Strips& strips, std::int64_t begin, std::int64_t end);
ConstStrips cut(const ConstStrips& strips, std::int64_t begin, std::int64_t end);

/// Copies the strips' bytes into `into`, whose size must be total(from).
void pack(const ConstStrips& from, std::span<std::byte> into);

/// Copies `from`, whose size must be total(into), into the strips.
void unpack(std::span<const std::byte> from, const Strips& into);

/// Copies `from` into `into`, which are as many bytes, however each is cut; many, outside of
/// parallel regions, on that many OpenMP threads.
void copy(const ConstStrips& from, const Strips& into, int threads = 1);

}  // namespace dattn::comm
