#include "comm/watchdog.hpp"

#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <system_error>
#include <utility>

namespace dattn::comm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kTurn = 0.25;     // seconds from look to look, at most
constexpr double kStandstill = 1;  // seconds that a look may be late on a crowded machine
constexpr double kParting = 1;     // seconds that the others have to write down where they are
constexpr double kLastWords = 10;  // seconds that a rank has for that, where it cannot so soon

double seconds_on(clockid_t clock) {
  timespec time{};
  ::clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

void pause_for(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

}  // namespace

Watchdog::Watchdog(const Progress& progress, double seconds, int exit_code, Report report)
    : progress_(progress), limit_(seconds), exit_code_(exit_code), report_(std::move(report)) {
  // Signals are for the main thread.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { watch(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    over_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void Watchdog::connect(Communicator& world) {
  if (world.size() == 1) return;
  heartbeat_ = std::make_unique<Heartbeat>(world.rank(), world.size());
  std::string address = world.rank() == 0 ? heartbeat_->address() : "";
  world.broadcast(address, 0);
  heartbeat_->call(address);
  connected_.store(heartbeat_.get());
}

void Watchdog::at_end(std::function<void()> last) {
  const std::lock_guard lock(mutex_);
  last_ = std::move(last);
}

void Watchdog::raise_failed() {
  own_alarm_.store(Alarm::failed);
  if (connected_.load() != nullptr) pause_for(kParting);
}

void Watchdog::look(double seconds) {
  Stillness::Sight sight{
      .moves = progress_.moves(),
      .waits = progress_.waits(),
      .processor = seconds_on(CLOCK_PROCESS_CPUTIME_ID) - seconds_on(CLOCK_THREAD_CPUTIME_ID),
      .own = own_alarm_.load()};
  const double limit = limit_.load();
  Heartbeat* heart = connected_.load();
  if (heart != nullptr) {
    heart->hear();
    sight.others = heart->moves_of_others();
    sight.heard = heart->alarm();
    // A second more: whoever stopped with all others at work is told from one who stopped last.
    sight.silent = heart->silent(seconds, limit > 0 ? limit + kParting : 1e300);
  }
  const Stillness::Duty duty = stillness_.look(sight, seconds, limit);
  if (heart != nullptr) heart->tell(stillness_.moves(), std::max(sight.own, sight.heard));
  if (duty == Stillness::Duty::write_down && !std::exchange(reported_, true)) {
    report_({Alarm::failed, true, stillness_.seconds(), paused_, {}});
  }
  if (duty == Stillness::Duty::end) {
    end({Alarm::stuck, sight.heard == Alarm::stuck, stillness_.seconds(), paused_, sight.silent});
  }
}

void Watchdog::end(const Verdict& verdict) {
  Heartbeat* heart = connected_.load();
  const auto tell = [&] {
    if (heart == nullptr) return;
    heart->hear();
    heart->tell(stillness_.moves(), Alarm::stuck);
  };
  tell();
  Verdict full = verdict;
  if (heart != nullptr && full.silent.empty()) full.silent = heart->silent(0, 4 * kTurn + kParting);
  std::atomic<bool> said{false};
  const auto say = [&] {
    if (!std::exchange(reported_, true)) report_(full);
    const std::lock_guard lock(mutex_);
    if (last_) last_();
    said.store(true);
  };
  // A thread of its own: the file system that it writes to may be what is stuck.
  try {
    std::thread(say).detach();
  } catch (const std::system_error&) {
    say();
  }
  const auto begun = Clock::now();
  for (double passed = 0; passed < (said.load() ? kParting : kLastWords);) {
    tell();  // rank 0 passes it on
    pause_for(kParting / 20);
    passed = std::chrono::duration<double>(Clock::now() - begun).count();
  }
  ::_exit(exit_code_);
}

void Watchdog::watch() {
  Clock::time_point before = Clock::now();
  for (;;) {
    const double limit = limit_.load();
    const double turn = limit > 0 ? std::min(kTurn, limit / 8) : kTurn;
    {
      std::unique_lock lock(mutex_);
      wake_.wait_for(lock, std::chrono::duration<double>(turn), [this] { return over_; });
      if (over_) return;
    }
    const Clock::time_point now = Clock::now();
    const double passed = std::chrono::duration<double>(now - std::exchange(before, now)).count();
    // While the whole process stood still, in a debugger or a suspended machine, no time passed.
    paused_ = passed > 2 * turn + kStandstill ? passed : 0;
    look(std::min(passed, 2 * turn));
  }
}

}  // namespace dattn::comm
