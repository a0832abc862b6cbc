#pragma once

#include <string>
#include <vector>

#include "launcher/host.hpp"
#include "parallel/engine.hpp"

namespace dattn {

/// What every rank tells rank 0 about itself and its runs.
struct RankReport {
  Host host;
  int threads = 1;
  Index took = 0;                       ///< memory in bytes, at its most beyond what it began with
  std::vector<RunTimes> runs;           ///< of the forward pass, without their steps
  std::vector<RunTimes> backward_runs;  ///< likewise; none where there was no backward pass

  const std::vector<RunTimes>& of(Pass pass) const {
    return pass == Pass::forward ? runs : backward_runs;
  }
};

/// As text, and back; texts are only read by the program that wrote them.
std::string encoded(const RankReport& report);
RankReport decoded(const std::string& text);

}  // namespace dattn
