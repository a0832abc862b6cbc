#pragma once

#include <array>
#include <cstdint>
#include <random>

#include "kernels/random.hpp"

namespace dattn {

/// Standard normal numbers, as std::normal_distribution has them, drawn from 65,536 that are made
/// once: making each anew took up to two fifths of a test's time under sanitizers.
class NormalNumbers {
 public:
  double operator()(std::mt19937& bits) const { return numbers()[bits() % kCount]; }

 private:
  static constexpr std::uint64_t kCount = 1 << 16;

  static const std::array<double, kCount>& numbers() {
    static const auto all = [] {
      std::array<double, kCount> out;
      for (std::uint64_t i = 0; i < kCount; ++i) out[i] = normal(2024, i);
      return out;
    }();
    return all;
  }
};

}  // namespace dattn
