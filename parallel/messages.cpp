#include "parallel/messages.hpp"

#include <utility>

namespace dattn {

int Messages::post(const Message& message) {
  if (free_.empty()) {
    all_.push_back(message);
    return static_cast<int>(all_.size()) - 1;
  }
  const int number = free_.back();
  free_.pop_back();
  at(number) = message;
  return number;
}

std::optional<Messages::Pair> Messages::meet(int from, int to, int number) {
  const auto key = static_cast<std::uint64_t>(static_cast<std::uint32_t>(from)) << 32U |
                   static_cast<std::uint32_t>(to);
  Channel& channel = waiting_[key];
  const bool is_send = at(number).is_send;
  if (channel.empty() || at(channel.front()).is_send == is_send) {
    channel.push_back(number);
    return std::nullopt;
  }
  const int other = channel.front();
  channel.erase(channel.begin());  // there are few: a rank posts no further than it may write
  if (channel.empty()) waiting_.erase(key);
  return is_send ? Pair{number, other} : Pair{other, number};
}

const Message* Messages::first_alone() const {
  const Message* alone = nullptr;
  for (const auto& [key, channel] : waiting_) {
    const Message& m = all_[static_cast<std::size_t>(channel.front())];
    if (alone == nullptr || std::pair(m.rank, m.step) < std::pair(alone->rank, alone->step)) {
      alone = &m;
    }
  }
  return alone;
}

}  // namespace dattn
