#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "comm/strip.hpp"

namespace dattn::comm {

/// Whether this build has digests: whether there was xxHash when it was configured.
bool has_digest();

/// The version of xxHash, e.g. "0.8.1"; empty where there is none.
std::string digest_version();

/// XXH3-64 (xxHash) of bytes that come one after the other. It finds mistakes, not attacks.
/// Precondition: has_digest(), else std::logic_error.
class Digest {
 public:
  Digest();
  Digest(Digest&&) noexcept;
  Digest& operator=(Digest&&) noexcept;
  ~Digest();

  void add(std::span<const std::byte> bytes);
  /// Of all that was added so far.
  std::uint64_t value() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Of the bytes that the strips cover, in the order of the wire, however these are cut. Calls
/// `poll`, which may be empty, now and then.
std::uint64_t digest_of(const ConstStrips& strips, const std::function<void()>& poll = {});
std::uint64_t digest_of(std::span<const std::byte> bytes);

/// 16 digits, as xxhsum -H3 writes it.
std::string digest_text(std::uint64_t digest);

}  // namespace dattn::comm
