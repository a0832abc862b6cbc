#pragma once

#include <chrono>
#include <thread>

#include "comm/error.hpp"

namespace dattn::comm {

/// Calls `done()` until it is true, and yields the core between calls, since waiting ranks often
/// outnumber cores; throws Timeout(describe()) once `deadline` seconds have passed.
template <class Done, class Describe>
void wait_until(double deadline, Done&& done, Describe&& describe) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  while (!done()) {
    const double waited = std::chrono::duration<double>(Clock::now() - start).count();
    if (waited > deadline) throw Timeout(describe(), waited);
    std::this_thread::yield();
  }
}

}  // namespace dattn::comm
