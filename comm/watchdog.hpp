#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "comm/communicator.hpp"
#include "comm/heartbeat.hpp"
#include "comm/progress.hpp"
#include "comm/stillness.hpp"

namespace dattn::comm {

/// A thread that looks at a rank's Progress and gives up when nothing has moved for too long. It
/// never calls MPI. A rank moves when its Progress does or, while it does not wait for others, when
/// it uses its processor; and the watchdogs tell each other who moves, so that a rank may wait as
/// long as any other works. What stops as a whole, or hangs behind a cut cable, is heard no more.
class Watchdog {
 public:
  /// Why the job has to end, and how others know.
  struct Verdict {
    Alarm alarm = Alarm::stuck;
    bool told = false;             ///< another rank has noticed
    double seconds = 0;            ///< since anything has moved, as far as this rank knows
    double paused = 0;             ///< seconds for which this whole process stood still until now
    std::vector<int> silent = {};  ///< ranks that are heard no more
  };

  /// On the watchdog's thread, once: to say and write down where the rank is. After Alarm::stuck
  /// the process ends with `exit_code` a second later, when the others have done so too.
  using Report = std::function<void(const Verdict&)>;

  /// `seconds` 0: never gives up, but still does what others tell. `progress` outlives this.
  Watchdog(const Progress& progress, double seconds, int exit_code, Report report);
  Watchdog(const Watchdog&) = delete;
  ~Watchdog();

  void set_seconds(double seconds) { limit_.store(seconds); }
  double seconds() const { return limit_.load(); }

  /// Collective: from now on the watchdogs hear each other.
  void connect(Communicator& world);

  /// What is to be done on the watchdog's thread, after the report, when the process is about to
  /// end as stuck; replaces what was to be done before. All of it has some seconds only: what it
  /// waits for may be stuck as well.
  void at_end(std::function<void()> last);

  /// Before this rank aborts the job: gives the others a moment to write down where they are.
  void raise_failed();

 private:
  void watch();
  void look(double seconds);
  [[noreturn]] void end(const Verdict& verdict);

  const Progress& progress_;
  std::atomic<double> limit_;
  int exit_code_;
  Report report_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool over_ = false;           ///< with the mutex held
  std::function<void()> last_;  ///< likewise
  std::atomic<Alarm> own_alarm_{Alarm::none};
  std::atomic<Heartbeat*> connected_{nullptr};
  std::unique_ptr<Heartbeat> heartbeat_;
  // The thread's own.
  Stillness stillness_;
  double paused_ = 0;  ///< seconds for which the process stood still just before
  bool reported_ = false;
  std::thread thread_;  // last: starts when all else is there
};

}  // namespace dattn::comm
