#pragma once

#include <charconv>
#include <optional>
#include <string_view>

#include "kernels/range.hpp"

namespace dattn {

/// A count as users write it, 4096 or 4K; K, M, G and T, small or large, are powers of 1024.
/// Nothing where it is none, or more than an Index holds.
inline std::optional<Index> count_in(std::string_view text) {
  constexpr std::string_view kSuffixes = "KMGTkmgt";
  Index factor = 1;
  if (!text.empty()) {
    const std::size_t power = kSuffixes.find(text.back());
    if (power != std::string_view::npos) {
      factor = Index{1} << (10 * (power % 4 + 1));
      text.remove_suffix(1);
    }
  }
  // from_chars takes a minus sign, but neither spaces nor a plus sign.
  if (text.empty() || text[0] == '-') return std::nullopt;
  Index value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  if (__builtin_mul_overflow(value, factor, &value)) return std::nullopt;
  return value;
}

}  // namespace dattn
