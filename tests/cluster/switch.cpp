// The Ethernet switch between the hosts of cluster.py.
//
//   cluster_switch MBIT_PER_SECOND DELAY_US PID...
//
// PID is any process of a host. In the network namespace of the k-th it makes a TAP device eth0
// with the address 02:00:00:00:00:k+1, and carries frames between them. A frame leaves its host at
// the rate of that host's cable, travels for the delay, and enters the other host at the rate of
// the other cable; so what many send to one host queues up there. Rate 0 is no limit. Segments that
// the kernel has not cut yet (TSO) go through in one piece.
//
// It says "ready" when the devices exist, obeys lines "cut K" and "heal K" (host K's cable; frames
// on it are lost without a sign, as on a real one) with "ok", and ends when its input does. The
// kernel of a small machine may lack netem, which would delay packets; TAP devices are nearly
// everywhere.
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <queue>
#include <string>
#include <string_view>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using std::chrono::nanoseconds;

constexpr std::size_t kVirtioHeader = 10;  // virtio_net_hdr, whose header is no C++
constexpr std::size_t kEthernetHeader = 14;
constexpr std::size_t kLongestFrame = 65536 + 64;
constexpr std::size_t kOnTheWire = 24;  // preamble, checksum and gap of each frame
constexpr std::size_t kQueue = 64 << 20;
constexpr int kBurst = 16;  // frames of one host in a row
constexpr int kMostHosts = 64;

using Bytes = std::shared_ptr<const std::vector<unsigned char>>;

/// A frame on its way: `time` is when its first bit reaches the destination's cable or, once it is
/// `entering` the host, when its last bit has passed that cable.
struct Frame {
  Time time;
  std::uint64_t number;
  std::size_t from, to;
  nanoseconds length;
  bool entering;
  Bytes bytes;
};

struct Later {
  bool operator()(const Frame& a, const Frame& b) const {
    return a.time != b.time ? a.time > b.time : a.number > b.number;
  }
};

struct Port {
  int device = -1;
  bool cut = false;
  Time leaves_free{}, enters_free{};
  std::size_t queued = 0;
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "cluster_switch: %s: %s\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

std::optional<double> number(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !(value >= 0)) return {};
  return value;
}

/// A TAP device in the network namespace of a process, which becomes ours.
int open_device(const std::string& pid, std::size_t k) {
  const std::string path = "/proc/" + pid + "/ns/net";
  const int space = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (space < 0 || ::setns(space, CLONE_NEWNET) != 0) fail(path);
  ::close(space);
  const int device = ::open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (device < 0) fail("/dev/net/tun");
  ifreq request{};
  std::strcpy(request.ifr_name, "eth0");
  request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
  if (::ioctl(device, TUNSETIFF, &request) != 0) fail("a TAP device");
  ::ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
  request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
  std::memset(request.ifr_hwaddr.sa_data, 0, sizeof request.ifr_hwaddr.sa_data);
  request.ifr_hwaddr.sa_data[0] = 2;
  request.ifr_hwaddr.sa_data[5] = static_cast<char>(k + 1);
  if (::ioctl(device, SIOCSIFHWADDR, &request) != 0) fail("the address of a TAP device");
  return device;
}

class Switch {
 public:
  Switch(double mbit, double delay_us, std::vector<Port> ports)
      : nanoseconds_per_byte_(mbit > 0 ? 8e3 / mbit : 0),
        delay_(static_cast<std::int64_t>(delay_us * 1e3)),
        ports_(std::move(ports)) {}

  void run() {
    std::vector<pollfd> polled{{STDIN_FILENO, POLLIN, 0}};
    for (const Port& port : ports_) polled.push_back({port.device, POLLIN, 0});
    for (;;) {
      move(Clock::now());
      timespec wait{};
      if (!frames_.empty()) {
        const auto left = std::max(nanoseconds{0}, nanoseconds(frames_.top().time - Clock::now()));
        wait.tv_sec = left.count() / 1'000'000'000;
        wait.tv_nsec = left.count() % 1'000'000'000;
      }
      if (::ppoll(polled.data(), polled.size(), frames_.empty() ? nullptr : &wait, nullptr) <= 0) {
        continue;
      }
      if (polled[0].revents != 0 && !obey()) return;
      for (std::size_t k = 0; k < ports_.size(); ++k) {
        if ((polled[k + 1].revents & POLLIN) != 0) take_from(k);
      }
    }
  }

 private:
  /// Moves all frames whose time has come, earliest first.
  void move(Time now) {
    while (!frames_.empty() && frames_.top().time <= now) {
      Frame frame = frames_.top();
      frames_.pop();
      Port& to = ports_[frame.to];
      if (!frame.entering) {
        to.enters_free = std::max(to.enters_free, frame.time) + frame.length;
        frame.time = to.enters_free;
        frame.entering = true;
        frames_.push(std::move(frame));
        continue;
      }
      ports_[frame.from].queued -= frame.bytes->size();
      if (to.cut) continue;
      // A device that is down takes nothing: the frame is lost.
      [[maybe_unused]] const auto put =
          ::write(to.device, frame.bytes->data(), frame.bytes->size());
    }
  }

  void take_from(std::size_t k) {
    Port& port = ports_[k];
    for (int i = 0; i < kBurst; ++i) {
      const ssize_t got = ::read(port.device, buffer_.data(), buffer_.size());
      if (got < static_cast<ssize_t>(kVirtioHeader + kEthernetHeader)) return;
      const auto size = static_cast<std::size_t>(got);
      if (port.cut || port.queued > kQueue) continue;
      const nanoseconds length(static_cast<std::int64_t>(
          static_cast<double>(size - kVirtioHeader + kOnTheWire) * nanoseconds_per_byte_));
      const Time starts = std::max(port.leaves_free, Clock::now());
      port.leaves_free = starts + length;
      const auto bytes =
          std::make_shared<std::vector<unsigned char>>(buffer_.data(), buffer_.data() + size);
      const unsigned char* address = bytes->data() + kVirtioHeader;
      const bool to_all = (address[0] & 1) != 0;
      for (std::size_t to = 0; to < ports_.size(); ++to) {
        if (to == k || !(to_all || address[5] == to + 1)) continue;
        port.queued += size;
        frames_.push({starts + delay_, count_++, k, to, length, false, bytes});
      }
    }
  }

  /// Whether to go on.
  bool obey() {
    char text[256];
    const ssize_t got = ::read(STDIN_FILENO, text, sizeof text);
    if (got <= 0) return false;
    orders_.append(text, static_cast<std::size_t>(got));
    for (std::size_t end; (end = orders_.find('\n')) != std::string::npos;) {
      const std::string line = orders_.substr(0, end);
      orders_.erase(0, end + 1);
      const std::size_t space = std::min(line.find(' '), line.size());
      const std::string_view verb = std::string_view(line).substr(0, space);
      const double k = number(std::string_view(line).substr(std::min(space + 1, line.size())))
                           .value_or(kMostHosts);
      const bool good = k < static_cast<double>(ports_.size()) && (verb == "cut" || verb == "heal");
      if (good) ports_[static_cast<std::size_t>(k)].cut = verb == "cut";
      std::puts(good ? "ok" : "what?");
      std::fflush(stdout);
    }
    return true;
  }

  double nanoseconds_per_byte_;
  nanoseconds delay_;
  std::vector<Port> ports_;
  std::priority_queue<Frame, std::vector<Frame>, Later> frames_;
  std::vector<unsigned char> buffer_ = std::vector<unsigned char>(kLongestFrame);
  std::uint64_t count_ = 0;
  std::string orders_;
};

}  // namespace

int main(int argc, char** argv) {
  const auto mbit = number(argc > 1 ? argv[1] : "");
  const auto delay_us = number(argc > 2 ? argv[2] : "");
  if (!mbit || !delay_us || argc < 4 || argc > 3 + kMostHosts) {
    std::fputs("usage: cluster_switch MBIT_PER_SECOND DELAY_US PID...\n", stderr);
    return 2;
  }
  const int home = ::open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
  std::vector<Port> ports(static_cast<std::size_t>(argc - 3));
  for (std::size_t k = 0; k < ports.size(); ++k) ports[k].device = open_device(argv[3 + k], k);
  if (home < 0 || ::setns(home, CLONE_NEWNET) != 0) fail("/proc/self/ns/net");
  // Ranks that spin must not delay the link. Without the right to this, delays get longer.
  ::prctl(PR_SET_TIMERSLACK, 1UL);
  const sched_param first{.sched_priority = 20};
  if (::sched_setscheduler(0, SCHED_FIFO, &first) != 0) {
    std::fputs("cluster_switch: NOTE: no real-time priority here, so busy ranks delay the links\n",
               stderr);
  }
  std::puts("ready");
  std::fflush(stdout);
  Switch(*mbit, *delay_us, std::move(ports)).run();
}
