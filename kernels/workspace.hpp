#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <new>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "kernels/range.hpp"

namespace dattn {

/// Numbers or bytes nobody has initialised, on a cache line's boundary; large ones in large pages,
/// where the system has them.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(Index count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    const std::size_t align = bytes >= kLarge ? kPage : 64;
    memory_ = {static_cast<T*>(::operator new (bytes, std::align_val_t{align})), Delete{align}};
#if defined(MADV_HUGEPAGE)
    if (bytes >= kLarge) madvise(memory_.get(), bytes, MADV_HUGEPAGE);  // advice: may fail
#endif
  }
  T* get() const { return memory_.get(); }
  T& operator[](Index i) const { return memory_.get()[i]; }

 private:
  static constexpr std::size_t kPage = std::size_t{2} << 20;
  static constexpr std::size_t kLarge = 2 * kPage;
  struct Delete {
    std::size_t align = 64;
    void operator()(T* p) const { ::operator delete (p, std::align_val_t{align}); }
  };
  std::unique_ptr<T, Delete> memory_;
};

/// The large memory of kernels, kept from call to call: fresh pages cost more than what is done
/// with them. Serves one call at a time, and grows to the largest.
class Workspace {
 public:
  enum class Use : std::size_t { k, v, partials, ordered, count };

  /// Uninitialised; what an earlier call had for the same use is gone.
  template <class T>
  T* take(Use use, Index count) {
    Held& held = held_[static_cast<std::size_t>(use)];
    const Index bytes = count * static_cast<Index>(sizeof(T));
    if (held.bytes < bytes) {
      held.memory = Buffer<std::byte>();  // first, so that both are never there
      held.memory = Buffer<std::byte>(bytes);
      held.bytes = bytes;
    }
    return reinterpret_cast<T*>(held.memory.get());
  }

  /// All that it holds.
  Index bytes() const {
    Index sum = 0;
    for (const Held& held : held_) sum += held.bytes;
    return sum;
  }

 private:
  struct Held {
    Buffer<std::byte> memory;
    Index bytes = 0;
  };
  std::array<Held, static_cast<std::size_t>(Use::count)> held_;
};

}  // namespace dattn
