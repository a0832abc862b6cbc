#include "comm/heartbeat.hpp"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <random>
#include <sstream>
#include <utility>

namespace dattn::comm {
namespace {

struct Datagram {
  std::uint64_t job;
  std::int64_t moves;
  std::int32_t rank;
  Alarm alarm;
};

sockaddr* generic(sockaddr_in& address) { return reinterpret_cast<sockaddr*>(&address); }
const sockaddr* generic(const sockaddr_in& address) {
  return reinterpret_cast<const sockaddr*>(&address);
}

}  // namespace

Heartbeat::Heartbeat(int rank, int size)
    : rank_(rank), others_(rank == 0 ? static_cast<std::size_t>(size) : 1) {
  socket_ = ::socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (socket_ < 0) return;
  sockaddr_in any{};
  any.sin_family = AF_INET;  // any address, any port
  if (::bind(socket_, generic(any), sizeof any) == 0) return;
  ::close(std::exchange(socket_, -1));
}

Heartbeat::~Heartbeat() {
  if (socket_ >= 0) ::close(socket_);
}

std::string Heartbeat::address() const {
  sockaddr_in own{};
  socklen_t length = sizeof own;
  ifaddrs* all = nullptr;
  if (socket_ < 0 || ::getsockname(socket_, generic(own), &length) != 0 ||
      ::getifaddrs(&all) != 0) {
    return "0 0";
  }
  std::random_device random;
  std::ostringstream text;
  text << (std::uint64_t{random()} << 32U | random()) << ' ' << ntohs(own.sin_port);
  for (const ifaddrs* one = all; one != nullptr; one = one->ifa_next) {
    if (one->ifa_addr == nullptr || one->ifa_addr->sa_family != AF_INET) continue;
    std::array<char, INET_ADDRSTRLEN> name{};
    const auto* address = reinterpret_cast<const sockaddr_in*>(one->ifa_addr);
    if (::inet_ntop(AF_INET, &address->sin_addr, name.data(), name.size()) != nullptr) {
      text << ' ' << name.data();
    }
  }
  ::freeifaddrs(all);
  return text.str();
}

void Heartbeat::call(const std::string& address) {
  std::istringstream text(address);
  std::uint16_t port = 0;
  text >> job_ >> port;
  for (std::string name; rank_ != 0 && port != 0 && text >> name;) {
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(port);
    if (::inet_pton(AF_INET, name.c_str(), &to.sin_addr) == 1) rank_0_.push_back(to);
  }
}

void Heartbeat::send(std::int64_t moves, Alarm alarm, const sockaddr_in& to) const {
  const Datagram datagram{job_, moves, rank_, alarm};
  // Whether it arrives is for the receiver to notice.
  [[maybe_unused]] const auto sent =
      ::sendto(socket_, &datagram, sizeof datagram, 0, generic(to), sizeof to);
}

void Heartbeat::tell(std::int64_t moves, Alarm alarm) {
  if (alarm_ < alarm) alarm_ = alarm;
  if (socket_ < 0 || job_ == 0) return;
  if (rank_ != 0) {
    for (const sockaddr_in& to : rank_0_) send(moves, alarm_, to);
    return;
  }
  for (const Other& other : others_) moves += other.moves;
  for (const Other& other : others_) {
    if (other.heard) send(moves, alarm_, other.at);
  }
}

void Heartbeat::hear() {
  if (socket_ < 0 || job_ == 0) return;
  Datagram datagram{};
  sockaddr_in from{};
  for (socklen_t length = sizeof from;
       ::recvfrom(socket_, &datagram, sizeof datagram, 0, generic(from), &length) >= 0;
       length = sizeof from) {
    // Rank 0 hears the others, the others hear rank 0; a short datagram has another job's number.
    const std::int32_t rank = datagram.rank;
    if (std::exchange(datagram.job, 0) != job_ || (rank_ == 0) != (rank > 0) || rank < 0 ||
        rank >= static_cast<std::int64_t>(others_.size())) {
      continue;
    }
    Other& other = others_[static_cast<std::size_t>(rank)];
    if (!other.heard && rank == 0) rank_0_ = {from};
    other = {from, true, datagram.moves, 0};
    alarm_ = std::max(alarm_, datagram.alarm);
  }
}

std::int64_t Heartbeat::moves_of_others() const {
  std::int64_t all = 0;
  for (const Other& other : others_) all += other.moves;
  return all;
}

std::vector<int> Heartbeat::silent(double seconds, double limit) {
  std::vector<int> ranks;
  for (std::size_t r = 0; r < others_.size(); ++r) {
    if (!others_[r].heard) continue;
    others_[r].silence += seconds;
    if (others_[r].silence > limit) ranks.push_back(static_cast<int>(r));
  }
  return ranks;
}

}  // namespace dattn::comm
