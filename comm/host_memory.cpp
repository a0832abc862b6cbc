#include "comm/host_memory.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <sstream>
#include <stdexcept>
#include <system_error>

namespace dattn::comm {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

std::byte* map(int file, std::int64_t begin, std::int64_t bytes, int access) {
  void* at = ::mmap(nullptr, static_cast<std::size_t>(bytes), access, MAP_SHARED, file, begin);
  if (at == MAP_FAILED) fail(fmt::format("mapping {} bytes of shared memory", bytes));
  return static_cast<std::byte*>(at);
}

void unmap(const std::byte* at, std::int64_t bytes) {
  if (at != nullptr) ::munmap(const_cast<std::byte*>(at), static_cast<std::size_t>(bytes));
}

std::int64_t whole_pages(std::int64_t bytes) {
  static const std::int64_t page = ::sysconf(_SC_PAGESIZE);
  return (std::max<std::int64_t>(bytes, 1) + page - 1) / page * page;
}

/// The piece of `all`, (begin, bytes) by address, that has all of [data, data + bytes).
template <class Pieces>
auto piece_with(const Pieces& all, const std::byte* data, std::int64_t bytes) {
  auto found = all.upper_bound(data);
  if (found == all.begin()) return all.end();
  --found;
  return data + bytes <= found->first + found->second.bytes ? found : all.end();
}

}  // namespace

/// This rank's file. Memory that was allocated in it keeps it.
struct HostMemory::Own {
  explicit Own(std::int64_t bytes) : front_bytes(bytes), end(bytes) {
    file = ::memfd_create("dattn", MFD_CLOEXEC);
    if (file < 0) fail("memfd_create");
    try {
      grow();
      front = map(file, 0, bytes, PROT_READ | PROT_WRITE);
    } catch (...) {
      ::close(file);
      throw;
    }
    // A number of a process and of its file may mean another one elsewhere; this tells.
    std::random_device bits;
    token = (std::uint64_t{bits()} << 32U) | bits();
    std::memcpy(front, &token, sizeof token);
  }
  Own(const Own&) = delete;
  Own& operator=(const Own&) = delete;
  ~Own() {
    unmap(front, front_bytes);
    ::close(file);
  }

  void grow() const {
    // Beyond this limit the kernel would kill the process instead of returning an error.
    rlimit limit{};
    const bool beyond =
        ::getrlimit(RLIMIT_FSIZE, &limit) == 0 && static_cast<rlim_t>(end) > limit.rlim_cur;
    if (beyond) errno = EFBIG;
    if (beyond || ::ftruncate(file, end) != 0) fail(fmt::format("{} bytes of shared memory", end));
  }

  std::byte* take(std::int64_t bytes) {
    bytes = whole_pages(bytes);
    std::int64_t begin = end;
    if (const auto old = vacant.find(bytes); old != vacant.end()) {
      begin = old->second;
      vacant.erase(old);
    } else {
      end += bytes;
      try {
        grow();
      } catch (...) {
        end = begin;
        throw;
      }
    }
    std::byte* at = map(file, begin, bytes, PROT_READ | PROT_WRITE);
    ::madvise(at, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);  // where the kernel has them
    taken[at] = {0, begin, bytes, 0};
    return at;
  }

  void give_back(std::byte* at) {
    const Place place = taken.at(at);
    taken.erase(at);
    unmap(at, place.bytes);
    ::fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, place.begin, place.bytes);
    // Peers may have this place mapped still, so the next of this size gets the same.
    vacant.emplace(place.bytes, place.begin);
  }

  int file = -1;
  std::byte* front = nullptr;
  std::int64_t front_bytes;
  std::uint64_t token = 0;
  std::int64_t end;
  std::map<const std::byte*, Place> taken{};
  std::multimap<std::int64_t, std::int64_t> vacant{};  // bytes -> begin
};

HostMemory::HostMemory(std::int64_t front)
    : own_(std::make_shared<Own>(whole_pages(front))), front_bytes_(whole_pages(front)) {}

HostMemory::~HostMemory() {
  for (const Peer& peer : peers_) {
    for (const auto& [place, at] : peer.mapped) unmap(at, place.second);
    if (peer.file < 0) continue;
    unmap(peer.front, front_bytes_);
    ::close(peer.file);
  }
}

std::string HostMemory::name() const {
  return fmt::format("{} {} {}", ::getpid(), own_->file, own_->token);
}

void HostMemory::open(const std::vector<std::string>& names, int self) {
  self_ = self;
  peers_.resize(names.size());
  for (std::size_t m = 0; m < names.size(); ++m) {
    if (static_cast<int>(m) == self) continue;
    Peer& peer = peers_[m];
    long process = 0;
    int file = 0;
    std::uint64_t token = 0;
    std::istringstream(names[m]) >> process >> file >> token;
    const std::string path = fmt::format("/proc/{}/fd/{}", process, file);
    const auto stranger = [&] {
      return std::runtime_error(path +
                                " is not the memory of a rank of this job: its processes "
                                "have other numbers there");
    };
    struct stat about {};
    if (::stat(path.c_str(), &about) != 0) fail(path);
    if (!S_ISREG(about.st_mode) || about.st_size < front_bytes_) throw stranger();
    peer.file = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOCTTY);
    if (peer.file < 0) fail(path);
    peer.front = map(peer.file, 0, front_bytes_, PROT_READ | PROT_WRITE);
    if (std::memcmp(peer.front, &token, sizeof token) != 0) throw stranger();
  }
}

std::byte* HostMemory::front(int member) {
  return member == self_ ? own_->front : peers_[static_cast<std::size_t>(member)].front;
}

Memory HostMemory::allocate(std::int64_t bytes) {
  return {own_->take(bytes), [own = own_](std::byte* at) { own->give_back(at); }};
}

std::optional<HostMemory::Place> HostMemory::find(const std::byte* data, std::int64_t bytes) const {
  using Places = std::map<const std::byte*, Place>;
  for (const Places* all : std::initializer_list<const Places*>{&own_->taken, &seen_}) {
    const auto found = piece_with(*all, data, bytes);
    if (found == all->end()) continue;
    Place place = found->second;
    if (all == &own_->taken) place.member = self_;
    place.offset = data - found->first;
    return place;
  }
  return std::nullopt;
}

const std::byte* HostMemory::at(const Place& place) {
  if (place.member == self_) {
    for (const auto& [at, mine] : own_->taken) {
      if (mine.begin == place.begin) return at + place.offset;
    }
    throw std::logic_error("memory of this rank that it has given back");
  }
  Peer& peer = peers_[static_cast<std::size_t>(place.member)];
  const std::byte*& at = peer.mapped[{place.begin, place.bytes}];
  if (at == nullptr) {
    at = map(peer.file, place.begin, place.bytes, PROT_READ);
    seen_[at] = {place.member, place.begin, place.bytes, 0};
  }
  return at + place.offset;
}

}  // namespace dattn::comm
