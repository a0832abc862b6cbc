#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace dattn::comm {

/// Where one rank is, and its last events. The main thread says so as it goes, which costs a few
/// stores; other threads read at any time: every field is an atomic, and what is read while the
/// main thread moves on may mix two events.
class Progress {
 public:
  /// What happened: a phase began, a step of a Program was taken, or the rank had to wait.
  enum class Kind { phase, step, wait };

  /// One event, as read. Times are seconds since this object was made.
  struct Event {
    Kind kind = Kind::phase;
    std::string phase = {};  ///< "forward pass"
    std::string what = {};   ///< the step's text, or what is waited for: "receive", "barrier"
    int step = -1;           ///< of the Program under way; -1: none
    int peer = -1;           ///< of a wait; -1: all ranks
    std::int64_t bytes = 0;  ///< of a wait
    /// Of a wait for all ranks: how many such the communicator had before; else -1.
    std::int64_t sequence = -1;
    double begin = 0;
    double end = -1;  ///< of a wait; negative while it lasts
  };

  static constexpr std::size_t kKept = 256;  ///< events

  Progress() = default;
  Progress(const Progress&) = delete;

  // ---- the main thread's -----------------------------------------------------------------------

  /// A part of the job begins. `name` is a literal.
  void phase(const char* name);

  /// Texts of the steps that step() will name.
  void program(std::vector<std::string> steps);
  void step(std::size_t index);

  /// The rank now waits for `peer` (-1: all ranks), until moved_on(). `what` is a literal.
  void wait(const char* what, int peer, std::int64_t bytes, std::int64_t sequence = -1);
  void moved_on();

  /// Something arrived, or got done.
  void moved() { moves_.fetch_add(1, std::memory_order_relaxed); }

  // ---- any thread's ----------------------------------------------------------------------------

  /// Grows with everything that happens.
  std::int64_t moves() const { return moves_.load(std::memory_order_relaxed); }
  /// Whether the rank only waits for others. If not, it moves as long as it uses its processor.
  bool waits() const { return waits_.load(std::memory_order_relaxed); }
  /// Seconds since this object was made.
  double now() const;
  /// The last events, the oldest first; the last of them is where the rank is.
  std::vector<Event> events() const;

 private:
  struct Place {
    std::atomic<Kind> kind{Kind::phase};
    std::atomic<const char*> phase{nullptr};
    std::atomic<const char*> what{nullptr};
    std::atomic<std::int64_t> program{0};
    std::atomic<int> step{-1};
    std::atomic<int> peer{-1};
    std::atomic<std::int64_t> bytes{0};
    std::atomic<std::int64_t> sequence{-1};
    std::atomic<double> begin{0};
    std::atomic<double> end{-1};
  };
  using Texts = std::shared_ptr<const std::vector<std::string>>;

  void put(Kind kind, const char* what, int peer, std::int64_t bytes, std::int64_t sequence);

  std::int64_t start_ = clock();
  static std::int64_t clock();

  std::array<Place, kKept> ring_{};
  std::atomic<std::int64_t> count_{0};  ///< of events ever put
  std::atomic<std::int64_t> moves_{0};
  std::atomic<bool> waits_{false};
  const char* phase_ = "start";
  int step_ = -1;
  std::int64_t program_ = 0;
  mutable std::mutex mutex_;                           ///< of texts_
  std::vector<std::pair<std::int64_t, Texts>> texts_;  ///< of the last programs, by number
};

/// While it lives, the rank's Progress says what it waits for. `progress` may be null.
class Waiting {
 public:
  Waiting(Progress* progress, const char* what, int peer, std::int64_t bytes,
          std::int64_t sequence = -1)
      : progress_(progress) {
    if (progress_ != nullptr) progress_->wait(what, peer, bytes, sequence);
  }
  Waiting(const Waiting&) = delete;
  ~Waiting() {
    if (progress_ != nullptr) progress_->moved_on();
  }

 private:
  Progress* progress_;
};

}  // namespace dattn::comm
