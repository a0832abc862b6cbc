#pragma once

#include <string>
#include <vector>

namespace dattn {

/// Ranks on named axes; pure arithmetic. The last axis runs fastest: on {outer 2, inner 3} rank 4
/// is (1, 1), so neighbours along the inner axis are neighbouring ranks.
struct Mesh {
  struct Axis {
    std::string name;
    int size = 1;
    friend bool operator==(const Axis&, const Axis&) = default;
  };
  std::vector<Axis> axes;
  /// Which rank stands at each place, counted as above; empty: the rank of that number.
  std::vector<int> order = {};

  int ranks() const;
  /// Where `rank` stands on `axis`.
  int coordinate(int rank, int axis) const;
  /// The ranks that share every coordinate with `rank` but that of `axis`, in its order.
  std::vector<int> group(int rank, int axis) const;
  /// E.g. "2x3".
  std::string text() const;

  friend bool operator==(const Mesh&, const Mesh&) = default;
};

/// All ranks on one axis.
Mesh line(int ranks);

}  // namespace dattn
