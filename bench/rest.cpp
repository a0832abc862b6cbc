#include "bench/rest.hpp"

#include <array>
#include <chrono>
#include <thread>

namespace dattn {

void rest_until_all(comm::Communicator& ranks) {
  constexpr int kTag = 99;
  constexpr auto kNap = std::chrono::microseconds(200);
  const int size = ranks.size();
  // Dissemination: after the round at distance d a rank knows of the 2 d - 1 ranks before it.
  for (int distance = 1; distance < size; distance *= 2) {
    std::array<std::byte, 1> token{};
    comm::Communicator::Request in = ranks.recv(comm::strips_of(std::span<std::byte>(token)),
                                                (ranks.rank() + size - distance) % size, kTag);
    comm::Communicator::Request out =
        ranks.send_bytes({std::byte{1}}, (ranks.rank() + distance) % size, kTag);
    while (!in.test() || !out.test()) std::this_thread::sleep_for(kNap);
  }
}

}  // namespace dattn
