#pragma once

#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "comm/loopback.hpp"

namespace dattn {

/// Runs `body` on every rank, a thread each; an exception in one fails the job, so that none hangs.
/// What each rank threw, or "".
template <class Body>
std::vector<std::string> errors_on_ranks(comm::Loopback& job, int ranks, const Body& body) {
  std::vector<std::string> errors(static_cast<std::size_t>(ranks));
  std::vector<std::jthread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      try {
        body(job.at(r));
      } catch (const std::exception& error) {
        errors[static_cast<std::size_t>(r)] = error.what();
        job.fail(error.what());
      }
    });
  }
  threads.clear();  // joins
  return errors;
}

}  // namespace dattn
