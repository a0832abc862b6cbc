#pragma once

#include <cstdint>
#include <vector>

#include "comm/heartbeat.hpp"

namespace dattn::comm {

/// For how long nothing has moved, and what follows from that: the rules of a Watchdog, without its
/// clock, thread and socket.
class Stillness {
 public:
  /// What there is to see at a look.
  struct Sight {
    std::int64_t moves = 0;        ///< of this rank's Progress, ever
    bool waits = false;            ///< for others, without work of its own
    double processor = 0;          ///< seconds of it that this rank has used, ever
    std::int64_t others = 0;       ///< moves of the other ranks, ever
    std::vector<int> silent = {};  ///< ranks that are heard no more
    Alarm own = Alarm::none;       ///< raised by this rank
    Alarm heard = Alarm::none;     ///< raised by another
  };

  enum class Duty {
    none,
    write_down,  ///< where this rank is: another is about to abort the job
    end          ///< the job
  };

  /// `seconds` after the look before; `limit` of seconds that nothing may move, 0: no limit.
  Duty look(const Sight& now, double seconds, double limit);

  /// Looks at which this rank had moved: what the others are told.
  std::int64_t moves() const { return moves_; }
  /// Since anything has moved, as far as this rank knows.
  double seconds() const { return seconds_; }

 private:
  bool moved(const Sight& now, double seconds) const;

  Sight before_{};
  std::int64_t moves_ = 0;
  double seconds_ = 0;
};

}  // namespace dattn::comm
