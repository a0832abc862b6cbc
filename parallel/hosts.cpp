#include "parallel/hosts.hpp"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <map>
#include <numeric>
#include <optional>
#include <stdexcept>

namespace dattn {
namespace {

/// Numbers with `separator` between them; nothing if these are none.
std::optional<std::vector<int>> numbers(std::string_view text, char separator) {
  std::vector<int> all;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (true) {
    int value = 0;
    const auto [next, error] = std::from_chars(at, end, value);
    if (error != std::errc{} || value < 0) return {};
    all.push_back(value);
    if (next == end) return all;
    if (*next != separator) return {};
    at = next + 1;
  }
}

/// Hosts of neighbouring ranks.
Hosts of_sizes(const std::vector<int>& sizes) {
  std::vector<int> by_rank;
  for (std::size_t host = 0; host < sizes.size(); ++host) {
    by_rank.insert(by_rank.end(), static_cast<std::size_t>(sizes[host]), static_cast<int>(host));
  }
  return Hosts(by_rank);
}

}  // namespace

Hosts::Hosts(const std::vector<int>& by_rank) {
  std::map<int, int> numbers;
  for (const int host : by_rank) {
    of_.push_back(numbers.try_emplace(host, static_cast<int>(numbers.size())).first->second);
  }
  if (numbers.size() < 2) {
    of_.clear();
    return;
  }
  ranks_.resize(numbers.size());
  for (std::size_t rank = 0; rank < of_.size(); ++rank) {
    ranks_[static_cast<std::size_t>(of_[rank])].push_back(static_cast<int>(rank));
  }
}

int Hosts::each() const {
  const std::size_t first = ranks_.front().size();
  const bool even =
      std::all_of(ranks_.begin(), ranks_.end(), [&](const auto& r) { return r.size() == first; });
  return even ? static_cast<int>(first) : 0;
}

std::vector<int> Hosts::side_by_side(std::vector<int> ranks) const {
  std::stable_sort(ranks.begin(), ranks.end(), [&](int a, int b) { return of(a) < of(b); });
  return ranks;
}

std::string Hosts::text() const {
  if (count() == 1) return "1";
  std::string words;
  if (!std::is_sorted(of_.begin(), of_.end())) {
    for (const int host : of_) words += (words.empty() ? "" : ",") + std::to_string(host);
    return words;
  }
  if (each() > 0) return std::to_string(count()) + "x" + std::to_string(each());
  for (const auto& some : ranks_) words += (words.empty() ? "" : "+") + std::to_string(some.size());
  return words;
}

Hosts parse_hosts(std::string_view text, int ranks) {
  const std::string quoted = "'" + std::string(text.substr(0, 60)) + "'";
  const auto complain = [&](const std::string& why) -> Hosts {
    throw std::invalid_argument(quoted + " " + why);
  };
  const auto wrong = [&](std::int64_t have) {
    return complain("is " + std::to_string(have) + " ranks, but there are " +
                    std::to_string(ranks));
  };
  if (text.find(',') != std::string_view::npos) {
    if (const auto by_rank = numbers(text, ',')) {
      if (std::ssize(*by_rank) != ranks) return wrong(std::ssize(*by_rank));
      return Hosts(*by_rank);
    }
  } else if (const auto grid = numbers(text, 'x'); grid && grid->size() <= 2) {
    const std::int64_t hosts = grid->front();
    if (hosts > 0 && grid->size() == 1) {
      if (ranks % hosts != 0) {
        return complain("hosts do not divide " + std::to_string(ranks) +
                        " ranks; say how many ranks each has, as in 2+1+3");
      }
      return of_sizes(
          std::vector<int>(static_cast<std::size_t>(hosts), static_cast<int>(ranks / hosts)));
    }
    if (hosts > 0 && grid->back() > 0) {
      if (hosts * grid->back() != ranks) return wrong(hosts * grid->back());
      return of_sizes(std::vector<int>(static_cast<std::size_t>(hosts), grid->back()));
    }
  } else if (const auto sizes = numbers(text, '+')) {
    if (std::find(sizes->begin(), sizes->end(), 0) == sizes->end()) {
      const auto sum = std::accumulate(sizes->begin(), sizes->end(), std::int64_t{0});
      if (sum != ranks) return wrong(sum);
      return of_sizes(*sizes);
    }
  }
  return complain(
      "does not say which hosts the ranks are on: as in 2x4 (2 hosts of 4), 2+1+3 (ranks of each) "
      "or 0,1,0,1 (the host of each rank)");
}

}  // namespace dattn
