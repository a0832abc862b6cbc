#include "parallel/speeds.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "kernels/check.hpp"

namespace dattn {
namespace {

std::string number(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.4g", value);
  return text.data();
}

/// Reads all of `text`; whether it was a number.
template <class Number>
bool read(std::string_view text, Number& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc{} && end == text.data() + text.size();
}

}  // namespace

Speeds::Speeds(const std::vector<double>& by_rank) {
  double fastest = 0;
  for (const double speed : by_rank) {
    if (!std::isfinite(speed) || speed <= 0) {
      throw std::invalid_argument("a speed of " + number(speed) + " is no positive number");
    }
    fastest = std::max(fastest, speed);
  }
  for (const double speed : by_rank) {
    parts_.push_back(std::llround(speed / fastest * kFastest));
    if (parts_.back() == 0) {
      throw std::invalid_argument("a speed of " + number(speed) + " is less than 1/" +
                                  std::to_string(kFastest) + " of the fastest, " + number(fastest) +
                                  "; leave such a rank out");
    }
  }
  if (std::all_of(parts_.begin(), parts_.end(), [](Index p) { return p == kFastest; })) {
    parts_.clear();
  }
}

int Speeds::slowest() const {
  return static_cast<int>(std::min_element(parts_.begin(), parts_.end()) - parts_.begin());
}

int Speeds::fastest() const {
  return static_cast<int>(std::max_element(parts_.begin(), parts_.end()) - parts_.begin());
}

std::string Speeds::text() const {
  if (equal()) return "1";
  std::string words;
  for (int from = 0; from < size();) {
    int to = from + 1;
    while (to < size() && parts(to) == parts(from)) ++to;
    if (!words.empty()) words += ',';
    if (to - from > 1) words += std::to_string(to - from) + "x";
    words += number(of(from));  // four digits tell steps of 1/1024 apart
    from = to;
  }
  return words;
}

Speeds parse_speeds(std::string_view text, int ranks) {
  const std::string quoted = "'" + std::string(text.substr(0, 60)) + "'";
  std::vector<double> by_rank;
  for (std::string_view rest = text;;) {
    const std::string_view item = rest.substr(0, rest.find(','));
    const std::size_t times = item.find('x');
    int count = 1;
    double speed = 0;
    const bool counted = times == std::string_view::npos || read(item.substr(0, times), count);
    const bool is_number =
        read(times == std::string_view::npos ? item : item.substr(times + 1), speed);
    if (!counted || !is_number || count < 1 || !std::isfinite(speed) || speed <= 0) {
      throw std::invalid_argument("'" + std::string(item.substr(0, 40)) + "' in " + quoted +
                                  " is no positive number, nor one for several ranks; give " +
                                  std::to_string(ranks) + ", as in 1,1,0.5 or 2x1,0.5");
    }
    if (count > ranks - std::ssize(by_rank)) {
      throw std::invalid_argument(quoted + " has speeds of more ranks than there are, " +
                                  std::to_string(ranks));
    }
    by_rank.insert(by_rank.end(), static_cast<std::size_t>(count), speed);
    if (item.size() == rest.size()) break;
    rest.remove_prefix(item.size() + 1);
  }
  if (std::ssize(by_rank) != ranks) {
    throw std::invalid_argument(quoted + " has speeds of " + std::to_string(by_rank.size()) +
                                " ranks, but there are " + std::to_string(ranks));
  }
  try {
    return Speeds(by_rank);
  } catch (const std::invalid_argument& e) {
    throw std::invalid_argument(quoted + ": " + e.what());
  }
}

Speeds rounded_speeds(std::span<const double> by_rank, int steps) {
  CHECK(!by_rank.empty() && steps > 0, by_rank.size(), steps);
  const double fastest = *std::max_element(by_rank.begin(), by_rank.end());
  std::vector<double> rounded;
  for (const double speed : by_rank) {
    rounded.push_back(std::max(1.0, std::round(speed / fastest * steps)));
  }
  return Speeds(rounded);
}

}  // namespace dattn
