#include "comm/stillness.hpp"

#include <algorithm>

namespace dattn::comm {
namespace {

constexpr double kBusy = 0.002;  // of its time that a rank at work uses its processor, at least

}  // namespace

bool Stillness::moved(const Sight& now, double seconds) const {
  if (now.moves != before_.moves) return true;
  return !now.waits && now.processor - before_.processor > kBusy * seconds;
}

Stillness::Duty Stillness::look(const Sight& now, double seconds, double limit) {
  const bool own = moved(now, seconds);
  if (own) ++moves_;
  seconds_ = own || now.others != before_.others ? 0 : seconds_ + seconds;
  before_ = now;
  const bool stuck = limit > 0 && (seconds_ > limit || !now.silent.empty());
  if (stuck || std::max(now.own, now.heard) == Alarm::stuck) return Duty::end;
  return now.heard == Alarm::failed && now.own == Alarm::none ? Duty::write_down : Duty::none;
}

}  // namespace dattn::comm
