#include "parallel/machine.hpp"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <utility>

namespace dattn {

std::string Machine::text() const {
  std::array<char, 160> line{};
  std::snprintf(line.data(), line.size(), "latency=%.3g,bandwidth=%.3g,rate=%.3g,overhead=%.3g",
                latency, bandwidth, rate, overhead);
  std::string words = line.data();
  if (backward_rate > 0) {
    std::snprintf(line.data(), line.size(), ",backward_rate=%.3g", backward_rate);
    words += line.data();
  }
  if (rows > 0) {
    std::snprintf(line.data(), line.size(), ",rows=%.3g", rows);
    words += line.data();
  }
  if (packs > 0) {
    std::snprintf(line.data(), line.size(), ",packs=%.3g", packs);
    words += line.data();
  }
  if (lanes > 0) {
    std::snprintf(line.data(), line.size(), ",lanes=%.3g,granule=%.3g", lanes, granule);
    words += line.data();
  }
  if (net_latency >= 0) {
    std::snprintf(line.data(), line.size(), ",net_latency=%.3g", net_latency);
    words += line.data();
  }
  if (net_bandwidth > 0) {
    std::snprintf(line.data(), line.size(), ",net_bandwidth=%.3g", net_bandwidth);
    words += line.data();
  }
  return words;
}

namespace {

// Beyond these bounds, which no machine comes near, the times of a plan could overflow.
constexpr double kMostSeconds = 1e6;
constexpr double kLeastRate = 1;
constexpr double kMostRate = 1e30;

}  // namespace

Machine parse_machine(std::string_view text, Machine base) {
  const std::array fields{std::pair{"latency", &base.latency},
                          std::pair{"bandwidth", &base.bandwidth},
                          std::pair{"rate", &base.rate},
                          std::pair{"overhead", &base.overhead},
                          std::pair{"backward_rate", &base.backward_rate},
                          std::pair{"rows", &base.rows},
                          std::pair{"packs", &base.packs},
                          std::pair{"lanes", &base.lanes},
                          std::pair{"granule", &base.granule},
                          std::pair{"net_latency", &base.net_latency},
                          std::pair{"net_bandwidth", &base.net_bandwidth}};
  while (!text.empty()) {
    const std::string_view part = text.substr(0, text.find(','));
    text.remove_prefix(part.size() + (part.size() < text.size() ? 1 : 0));
    const std::size_t equals = part.find('=');
    double* field = nullptr;
    for (const auto& [name, place] : fields) {
      if (part.substr(0, equals) == name) field = place;
    }
    const std::string_view number = equals == std::string_view::npos ? "" : part.substr(equals + 1);
    double value = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), value);
    const bool read = error == std::errc{} && end == number.data() + number.size();
    const bool of_seconds =
        field == &base.latency || field == &base.overhead || field == &base.net_latency;
    // Whole numbers; all others are seconds or rates.
    constexpr double kMostLanes = 4096;
    const bool counts = field == &base.lanes || field == &base.granule;
    const bool right = of_seconds ? value >= 0 && value <= kMostSeconds
                       : counts   ? value >= 1 && value <= kMostLanes && value == std::floor(value)
                                  : value >= kLeastRate && value <= kMostRate;
    if (field == nullptr || !read || !right) {
      throw std::invalid_argument(
          "'" + std::string(part.substr(0, 40)) +
          "' is none of latency=S, bandwidth=B, rate=F, overhead=S, backward_rate=F, rows=B, "
          "packs=B, lanes=N, granule=N, net_latency=S, net_bandwidth=B with 0 to 1e6 seconds, 1 to "
          "1e30 a second, or 1 to 4096 lanes");
    }
    *field = value;
  }
  return base;
}

}  // namespace dattn
