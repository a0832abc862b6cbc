#pragma once

#include <gtest/gtest.h>

#include <string>

#include "tests/loopback_ranks.hpp"

namespace dattn::testing {

struct Mode {
  const char* name;
  bool rendezvous;
  int delay;
};

/// As errors_on_ranks(), expecting none.
template <class Body>
void on_all_ranks(int ranks, const Mode& mode, std::uint64_t seed, const Body& body) {
  comm::Loopback job(
      ranks,
      {.seed = seed, .max_delay_polls = mode.delay, .rendezvous = mode.rendezvous, .deadline = 60});
  for (const std::string& e : errors_on_ranks(job, ranks, body)) EXPECT_EQ(e, "");
}

}  // namespace dattn::testing
