#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include "kernels/range.hpp"

namespace dattn {

/// Address space for something that grows: the system gives pages of zeros as they are first
/// touched, so that growing moves nothing. Throws std::bad_alloc where there is none left.
class Reserved {
 public:
  Reserved() = default;
  /// `whole`: most of it will be touched, so that it may come in large pages, where the system has
  /// them: who reads some numbers of each row in turn waits less for addresses.
  explicit Reserved(Index bytes, bool whole = false) {
    const auto size = static_cast<std::size_t>(std::max<Index>(1, bytes));
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    memory_ = Memory(static_cast<std::byte*>(p), Unmapped{size});
#if defined(MADV_HUGEPAGE)
    if (whole) madvise(p, size, MADV_HUGEPAGE);  // advice: may fail
#endif
  }
  std::byte* get() const { return memory_.get(); }

  /// Gives the whole pages of these bytes back; what lies there reads as zeros.
  void give_back(Range bytes) {
    const auto page = static_cast<Index>(sysconf(_SC_PAGESIZE));
    const Index from = (bytes.begin + page - 1) / page * page;
    const Index to = bytes.end / page * page;
    if (from < to) madvise(get() + from, static_cast<std::size_t>(to - from), MADV_DONTNEED);
  }

 private:
  struct Unmapped {
    std::size_t bytes;
    void operator()(std::byte* p) const { munmap(p, bytes); }
  };
  using Memory = std::unique_ptr<std::byte[], Unmapped>;
  Memory memory_{nullptr, Unmapped{0}};
};

}  // namespace dattn
