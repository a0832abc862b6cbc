#include "bench/rest.hpp"

#include <fmt/format.h>

#include <array>
#include <chrono>
#include <thread>

#include "bench/measure.hpp"

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

std::vector<int> ranks_listed(const boost::program_options::variables_map& values, int all) {
  if (values.count("ranks") == 0) return {all};
  std::vector<int> ranks;
  for (const std::int64_t p : counts_of("ranks", values["ranks"].as<std::string>())) {
    if (p > all) {
      throw Failure(
          Exit::usage,
          fmt::format("--ranks: {} ranks, but the job has {}; start more with mpirun -np", p, all));
    }
    ranks.push_back(static_cast<int>(p));
  }
  return ranks;
}

}  // namespace dattn
