#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

namespace dattn {

/// A bfloat16: the upper half of a float. Storage only; arithmetic is done in float.
struct BFloat16 {
  std::uint16_t bits = 0;

  BFloat16() = default;
  /// Rounds to nearest, ties to even; NaN stays NaN.
  explicit BFloat16(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<std::uint16_t>(nan ? (u >> 16) | 0x40u
                                          : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  explicit BFloat16(double x) : BFloat16(static_cast<float>(x)) {}
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  explicit operator double() const { return static_cast<double>(static_cast<float>(*this)); }
  friend bool operator==(BFloat16, BFloat16) = default;
};

/// What is added up of numbers of type E.
template <class E>
using SumOf = std::conditional_t<std::is_same_v<E, BFloat16>, float, E>;

}  // namespace dattn
