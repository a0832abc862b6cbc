#pragma once

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "launcher/failure.hpp"
#include "launcher/values.hpp"

namespace dattn {

/// Seconds on a clock that only moves on.
inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// `values` may be in any order. @pre not empty
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

/// A comma list of counts of at least 1; Failure(usage) naming the option.
inline std::vector<std::int64_t> counts_of(const std::string& option, std::string_view text) {
  std::vector<std::int64_t> out;
  while (true) {
    const std::size_t comma = std::min(text.find(','), text.size());
    try {
      out.push_back(parse_count(text.substr(0, comma), 1));
    } catch (const BadValue& bad) {
      throw Failure(Exit::usage, "--" + option + ": " + bad.complaint);
    }
    if (comma == text.size()) return out;
    text.remove_prefix(comma + 1);
  }
}

}  // namespace dattn
