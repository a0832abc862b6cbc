#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace dattn::comm {

/// Bytes with an owner that knows how to give them back; null: none.
using Memory = std::shared_ptr<std::byte>;

/// Memory begins at multiples of this: whole cache lines and vector registers.
inline constexpr std::size_t kAlign = 64;

/// Memory of this process, which only it sees. Throws std::bad_alloc.
inline Memory allocate(std::int64_t bytes) {
  constexpr auto align = std::align_val_t{kAlign};
  const auto size = static_cast<std::size_t>(bytes > 0 ? bytes : 1);
  return {new (align) std::byte[size], [](std::byte* p) { ::operator delete[](p, align); }};
}

}  // namespace dattn::comm
