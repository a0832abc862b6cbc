#include "comm/digest.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#ifdef DATTN_XXHASH
#define XXH_INLINE_ALL  // so that whoever links this library needs no other
#include <xxhash.h>
#endif

namespace dattn::comm {

#ifdef DATTN_XXHASH

struct Digest::State {
  XXH3_state_t xxh3;
};

bool has_digest() { return true; }

std::string digest_version() {
  return fmt::format("{}.{}.{}", XXH_VERSION_MAJOR, XXH_VERSION_MINOR, XXH_VERSION_RELEASE);
}

Digest::Digest() : state_(std::make_unique<State>()) { XXH3_64bits_reset(&state_->xxh3); }

void Digest::add(std::span<const std::byte> bytes) {
  XXH3_64bits_update(&state_->xxh3, bytes.data(), bytes.size());
}

std::uint64_t Digest::value() const { return XXH3_64bits_digest(&state_->xxh3); }

#else

struct Digest::State {};

bool has_digest() { return false; }
std::string digest_version() { return {}; }
Digest::Digest() { throw std::logic_error("this build has no xxHash"); }
void Digest::add(std::span<const std::byte>) {}
std::uint64_t Digest::value() const { return 0; }

#endif

Digest::Digest(Digest&&) noexcept = default;
Digest& Digest::operator=(Digest&&) noexcept = default;
Digest::~Digest() = default;

std::uint64_t digest_of(const ConstStrips& strips, const std::function<void()>& poll) {
  constexpr std::int64_t kPoll = std::int64_t{1} << 20;  // bytes: about 0.1 ms
  Digest digest;
  std::int64_t until_poll = kPoll;
  for (const ConstStrip& strip : cut(strips, 0, total(strips))) {
    for (std::int64_t i = 0; i < strip.count; ++i) {
      const std::byte* data = strip.data + i * strip.stride;
      for (std::int64_t done = 0; done < strip.length;) {
        const std::int64_t part = std::min(strip.length - done, until_poll);
        digest.add({data + done, static_cast<std::size_t>(part)});
        done += part;
        until_poll -= part;
        if (until_poll > 0) continue;
        if (poll) poll();
        until_poll = kPoll;
      }
    }
  }
  return digest.value();
}

std::uint64_t digest_of(std::span<const std::byte> bytes) { return digest_of(strips_of(bytes)); }

std::string digest_text(std::uint64_t digest) { return fmt::format("{:016x}", digest); }

}  // namespace dattn::comm
