#pragma once

#include <memory>
#include <vector>

#include "launcher/options.hpp"
#include "parallel/engine.hpp"

namespace dattn {

/// One strategy on one problem over one transport, ready to run: an engine for each pass, with its
/// inputs in place; those that the forward pass keeps are where it left them.
template <class E, comm::Transport T = comm::Communicator>
class Contender {
 public:
  /// Collective. Runs the forward pass once if there is a backward pass, whose Stats come of it.
  Contender(const Task& task, const Choice& choice, T& ranks, int threads);
  Contender(Contender&&) = delete;

  /// Collective: runs a pass of the task once, or parts of it.
  RunTimes run(Pass pass, const RunParts& parts = {}) {
    return engines_[static_cast<std::size_t>(pass)]->run(parts);
  }

 private:
  using Engine = dattn::Engine<T>;

  void load(const Task& task, const Program& program, Engine& engine);
  void read(const Task& task, const Block& block, E* to) const;

  Choice choice_;
  int threads_;
  std::vector<Program> programs_;
  std::vector<std::unique_ptr<Engine>> engines_;  ///< by pass, as programs_
};

}  // namespace dattn
