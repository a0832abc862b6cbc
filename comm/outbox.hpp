#pragma once

// Private to comm/*.cpp.

#include <deque>
#include <map>
#include <tuple>

#include "comm/handles.hpp"

namespace dattn::comm {

/// The sends of a rank that MPI does not have all pieces of: whoever waits for anything moves them,
/// since what he waits for may hang on them. Those of a channel go in order, as their receives do.
class Outbox {
 public:
  /// `message` stays where it is until MPI has all of it, or it is erased.
  void add(Request::Impl& message);
  /// It may well not be here.
  void erase(const Request::Impl& message) noexcept;
  /// Gives MPI what it may have by now.
  void advance();

 private:
  std::map<std::tuple<MPI_Comm, int, int>, std::deque<Request::Impl*>> channels_;  // by peer, tag
};

}  // namespace dattn::comm
