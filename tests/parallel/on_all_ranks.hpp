#pragma once

#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "comm/loopback.hpp"

namespace dattn::testing {

struct Mode {
  const char* name;
  bool rendezvous;
  int delay;
};

/// One thread a rank; an exception in one fails the job, so that none hangs.
template <class Body>
void on_all_ranks(int ranks, const Mode& mode, std::uint64_t seed, const Body& body) {
  comm::Loopback job(
      ranks,
      {.seed = seed, .max_delay_polls = mode.delay, .rendezvous = mode.rendezvous, .deadline = 60});
  std::vector<std::string> errors(static_cast<std::size_t>(ranks));
  {
    std::vector<std::jthread> threads;
    for (int r = 0; r < ranks; ++r) {
      threads.emplace_back([&, r] {
        try {
          body(job.at(r));
        } catch (const std::exception& e) {
          errors[static_cast<std::size_t>(r)] = e.what();
          job.fail(e.what());
        }
      });
    }
  }
  for (const std::string& e : errors) EXPECT_EQ(e, "");
}

}  // namespace dattn::testing
