#pragma once

#include <chrono>
#include <thread>

#include "comm/error.hpp"

namespace dattn::comm {

/// Yields the core, since waiting ranks often outnumber cores.
struct Yield {
  void operator()() const { std::this_thread::yield(); }
};

/// Calls `done()` until it is true, and `idle()` between calls; throws Timeout(describe()) once
/// `deadline` seconds have passed.
template <class Done, class Describe, class Idle = Yield>
void wait_until(double deadline, Done&& done, Describe&& describe, Idle&& idle = {}) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  while (!done()) {
    const double waited = std::chrono::duration<double>(Clock::now() - start).count();
    if (waited > deadline) throw Timeout(describe(), waited);
    idle();
  }
}

}  // namespace dattn::comm
