#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/range.hpp"

namespace dattn {

/// How fast ranks compute beside each other: of each the part of the fastest one, in steps of
/// 1/1024, so that the same words mean the same numbers everywhere.
class Speeds {
 public:
  static constexpr Index kFastest = 1024;

  /// All ranks are equally fast, however many there are.
  Speeds() = default;
  /// By rank, in any unit. Throws std::invalid_argument with the reason if a speed is not a
  /// positive number, or less than half a step.
  explicit Speeds(const std::vector<double>& by_rank);

  bool equal() const { return parts_.empty(); }
  /// How many ranks these are; 0 if they are equal, however many.
  int size() const { return static_cast<int>(parts_.size()); }
  /// In 1/1024 of the fastest rank.
  Index parts(int rank) const {
    return equal() ? kFastest : parts_[static_cast<std::size_t>(rank)];
  }
  /// 1 of the fastest rank.
  double of(int rank) const { return static_cast<double>(parts(rank)) / kFastest; }
  /// The first of the slowest ranks, and of the fastest; 0 if they are equal.
  int slowest() const;
  int fastest() const;
  /// As parse_speeds() reads it: "1,0.5" or, of neighbours that are equal, "4x1,4x0.5"; "1" if all
  /// are.
  std::string text() const;

  friend bool operator==(const Speeds&, const Speeds&) = default;

 private:
  std::vector<Index> parts_;  ///< by rank; empty if they are equal
};

/// Reads the speeds of `ranks` ranks: "1,1,0.5", a positive number for each, or for so many
/// neighbours, "2x1,0.5". Throws std::invalid_argument with the reason.
Speeds parse_speeds(std::string_view text, int ranks);

/// The same, rounded to so many steps up to the fastest rank, at least one. @pre all are positive
Speeds rounded_speeds(std::span<const double> by_rank, int steps);

}  // namespace dattn
