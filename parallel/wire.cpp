#include "parallel/wire.hpp"

#include <cstring>

#include "kernels/bfloat.hpp"

namespace dattn {
namespace {

/// Numbers from one poll to the next: less than 0.1 ms of work.
constexpr Index kPoll = Index{1} << 16;

/// Calls f(run, rounded) for each run of floats, of which all but the record's first are rounded:
/// `rounded` many.
template <class Piece, class F>
void each_run(const std::vector<Piece>& strips, const RoundedRecord& record,
              const std::function<void()>& poll, const F& f) {
  Index until_poll = kPoll;
  for (const Piece& strip : strips) {
    const Index floats = strip.length / static_cast<Index>(sizeof(float));
    const Index run = record.kept == 0 ? floats : record.numbers;
    for (Index i = 0; i < strip.count; ++i) {
      auto* data = strip.data + i * strip.stride;
      for (Index done = 0; done < floats; done += run) {
        f(data + done * static_cast<Index>(sizeof(float)), run - record.kept);
      }
      until_poll -= floats;
      if (until_poll > 0) continue;
      poll();
      until_poll = kPoll;
    }
  }
}

}  // namespace

void round(const comm::ConstStrips& from, const RoundedRecord& record, std::byte* into,
           const std::function<void()>& poll) {
  const Index kept = record.kept * static_cast<Index>(sizeof(float));
  each_run(from, record, poll, [&](const std::byte* run, Index rounded) {
    std::memcpy(into, run, static_cast<std::size_t>(kept));
    const auto* numbers = reinterpret_cast<const float*>(run + kept);
    auto* to = reinterpret_cast<BFloat16*>(into + kept);
    for (Index i = 0; i < rounded; ++i) to[i] = BFloat16(numbers[i]);
    into += kept + rounded * static_cast<Index>(sizeof(BFloat16));
  });
}

void widen(const std::byte* from, const RoundedRecord& record, const comm::Strips& into,
           const std::function<void()>& poll) {
  const Index kept = record.kept * static_cast<Index>(sizeof(float));
  each_run(into, record, poll, [&](std::byte* run, Index rounded) {
    std::memcpy(run, from, static_cast<std::size_t>(kept));
    const auto* numbers = reinterpret_cast<const BFloat16*>(from + kept);
    auto* to = reinterpret_cast<float*>(run + kept);
    for (Index i = 0; i < rounded; ++i) to[i] = static_cast<float>(numbers[i]);
    from += kept + rounded * static_cast<Index>(sizeof(BFloat16));
  });
}

}  // namespace dattn
