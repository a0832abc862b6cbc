#include "comm/progress.hpp"

#include <algorithm>
#include <chrono>

namespace dattn::comm {
namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr std::size_t kPrograms = 8;  // whose texts are kept: forward, backward, and a few before

}  // namespace

std::int64_t Progress::clock() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double Progress::now() const { return 1e-9 * static_cast<double>(clock() - start_); }

void Progress::phase(const char* name) {
  phase_ = name;
  step_ = -1;
  put(Kind::phase, nullptr, -1, 0, -1);
}

void Progress::put(Kind kind, const char* what, int peer, std::int64_t bytes,
                   std::int64_t sequence) {
  const std::int64_t number = count_.load(kRelaxed);
  Place& place = ring_[static_cast<std::size_t>(number) % kKept];
  place.kind.store(kind, kRelaxed);
  place.phase.store(phase_, kRelaxed);
  place.what.store(what, kRelaxed);
  place.program.store(program_, kRelaxed);
  place.step.store(step_, kRelaxed);
  place.peer.store(peer, kRelaxed);
  place.bytes.store(bytes, kRelaxed);
  place.sequence.store(sequence, kRelaxed);
  place.begin.store(now(), kRelaxed);
  place.end.store(-1, kRelaxed);
  count_.store(number + 1, std::memory_order_release);
  moved();
}

void Progress::program(std::vector<std::string> steps) {
  ++program_;
  step_ = -1;
  const std::lock_guard lock(mutex_);
  texts_.emplace_back(program_, std::make_shared<const std::vector<std::string>>(std::move(steps)));
  if (texts_.size() > kPrograms) texts_.erase(texts_.begin());
}

void Progress::step(std::size_t index) {
  step_ = static_cast<int>(index);
  put(Kind::step, nullptr, -1, 0, -1);
}

void Progress::wait(const char* what, int peer, std::int64_t bytes, std::int64_t sequence) {
  put(Kind::wait, what, peer, bytes, sequence);
  waits_.store(true, kRelaxed);
}

void Progress::moved_on() {
  waits_.store(false, kRelaxed);
  const std::int64_t last = count_.load(kRelaxed) - 1;
  ring_[static_cast<std::size_t>(last) % kKept].end.store(now(), kRelaxed);
  moved();
}

std::vector<Progress::Event> Progress::events() const {
  const std::int64_t count = count_.load(std::memory_order_acquire);
  const std::int64_t first = std::max<std::int64_t>(0, count - static_cast<std::int64_t>(kKept));
  const std::lock_guard lock(mutex_);
  std::vector<Event> events;
  for (std::int64_t number = first; number < count; ++number) {
    const Place& place = ring_[static_cast<std::size_t>(number) % kKept];
    Event event{.kind = place.kind.load(kRelaxed),
                .step = place.step.load(kRelaxed),
                .peer = place.peer.load(kRelaxed),
                .bytes = place.bytes.load(kRelaxed),
                .sequence = place.sequence.load(kRelaxed),
                .begin = place.begin.load(kRelaxed),
                .end = place.end.load(kRelaxed)};
    if (const char* phase = place.phase.load(kRelaxed)) event.phase = phase;
    if (const char* what = place.what.load(kRelaxed)) event.what = what;
    if (event.kind == Kind::step) {
      const std::int64_t program = place.program.load(kRelaxed);
      const auto index = static_cast<std::size_t>(event.step);
      for (const auto& [id, texts] : texts_) {
        if (id == program && index < texts->size()) event.what = (*texts)[index];
      }
    }
    events.push_back(std::move(event));
  }
  return events;
}

}  // namespace dattn::comm
