#include "comm/outbox.hpp"

#include <iterator>

namespace dattn::comm {

void Outbox::add(Request::Impl& message) {
  channels_[{message.comm, message.peer, message.tag}].push_back(&message);
}

void Outbox::erase(const Request::Impl& message) noexcept {
  const auto channel = channels_.find({message.comm, message.peer, message.tag});
  if (channel != channels_.end()) std::erase(channel->second, &message);
}

void Outbox::advance() {
  for (auto channel = channels_.begin(); channel != channels_.end();) {
    std::deque<Request::Impl*>& messages = channel->second;
    while (!messages.empty() && messages.front()->advance()) messages.pop_front();
    channel = messages.empty() ? channels_.erase(channel) : std::next(channel);
  }
}

}  // namespace dattn::comm
