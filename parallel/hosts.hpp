#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace dattn {

/// Which rank is on which host, in any order, any number of ranks on each. Hosts are numbered by
/// their first ranks.
class Hosts {
 public:
  /// All ranks on one host, however many there are.
  Hosts() = default;
  /// By rank the number of its host; equal numbers are one host.
  explicit Hosts(const std::vector<int>& by_rank);

  int count() const { return ranks_.empty() ? 1 : static_cast<int>(ranks_.size()); }
  int of(int rank) const { return of_.empty() ? 0 : of_[static_cast<std::size_t>(rank)]; }
  bool together(int a, int b) const { return of(a) == of(b); }
  /// The ranks of a host, ascending. @pre count() > 1
  const std::vector<int>& ranks(int host) const { return ranks_[static_cast<std::size_t>(host)]; }
  /// How many ranks these are; 0 if all are on one host, however many.
  int size() const { return static_cast<int>(of_.size()); }
  /// Ranks of each host if all have as many, else 0. @pre count() > 1
  int each() const;
  /// The same ranks, those of a host side by side, else in the order that they were.
  std::vector<int> side_by_side(std::vector<int> ranks) const;
  /// As parse_hosts() reads it: "1", "2x4", "2+1+3" or "0,1,0,1".
  std::string text() const;

  friend bool operator==(const Hosts&, const Hosts&) = default;

 private:
  std::vector<int> of_;                  ///< by rank; empty if there is one host
  std::vector<std::vector<int>> ranks_;  ///< by host; likewise
};

/// Reads where `ranks` ranks are: "2" or "2x4": so many hosts of as many neighbouring ranks each;
/// "2+1+3": ranks of each host, neighbours; "0,1,0,1": the host of each rank. Throws
/// std::invalid_argument with the reason.
Hosts parse_hosts(std::string_view text, int ranks);

}  // namespace dattn
