#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

namespace dattn {

/// splitmix64 (Steele, Lea, Flood 2014): a counter turned into 64 well mixed bits.
inline std::uint64_t mixed(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/// Number `i` of stream `stream`, standard normal (Box and Muller): it depends on these two alone,
/// so every rank can make just the numbers that it holds.
inline double normal(std::uint64_t stream, std::uint64_t i) {
  const std::uint64_t a = mixed(stream ^ mixed(2 * i));
  const std::uint64_t b = mixed(stream ^ mixed(2 * i + 1));
  const double u = (static_cast<double>(a >> 11) + 1) * 0x1p-53;  // (0, 1]: its logarithm exists
  const double angle = 2 * std::numbers::pi * static_cast<double>(b >> 11) * 0x1p-53;
  return std::sqrt(-2 * std::log(u)) * std::cos(angle);
}

}  // namespace dattn
