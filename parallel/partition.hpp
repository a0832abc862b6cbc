#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "kernels/mask.hpp"
#include "parallel/speeds.hpp"

namespace dattn {

/// Which rank owns which tokens.
///
/// A token has a *position* in its sequence, and a *row*: its place when rank 0's tokens are
/// written down first, then rank 1's, and so on. Blocks are made of rows, so that what a rank owns
/// is one Range under every partition; masks speak of positions.
class Partition {
 public:
  /// @pre the positions of all ranks are 0 .. tokens-1, each once, if `first` is 0; `first` is
  /// added to every position.
  explicit Partition(std::vector<Runs> owned, Index first = 0);

  int ranks() const { return static_cast<int>(offsets_.size()) - 1; }
  /// All tokens.
  Index tokens() const { return offsets_.back(); }
  /// The rows that `rank` owns.
  Range rows(int rank) const;
  /// The rank that owns `row`.
  int owner(Index row) const;
  /// Positions of these rows, in their order; runs that go on at the next rank are joined.
  Runs positions(const Ranges& rows) const;
  /// Which of the rows of `rank` lie at `positions`, ascending.
  Ranges rows_at(int rank, const Ranges& positions) const;
  /// Whether there are any.
  bool has_at(int rank, const Ranges& positions) const;

 private:
  /// Visits the rows of `rank` at `positions`, range by range, until `visit` returns true.
  template <class Visit>
  void visit_at(int rank, const Ranges& positions, const Visit& visit) const;

  std::vector<Runs> owned_;
  std::vector<Index> offsets_;  ///< first row of each rank, and the end
};

/// One way to deal tokens to ranks.
struct PartitionKind {
  std::string_view name;
  std::string_view summary;
  /// The token numbers of each rank. `shape`, `mask`, `speeds` matter to kinds that balance work.
  std::vector<Runs> (*deal)(Index tokens, int ranks, const Shape& shape, const Mask& mask,
                            const Speeds& speeds);
  /// Whether `deal` looks at the mask; such kinds deal queries, and keys follow them.
  bool by_area = false;
  /// Whether neighbouring tokens go to different ranks.
  bool strided = false;
};

/// The table of partitions. A new one is one function and one line here.
std::span<const PartitionKind> partition_kinds();

/// Tokens in turn, to ranks as often as they are fast, in steps of 1/16 of the fastest: of any
/// stretch of tokens each rank has about its share. Equal speeds: token i belongs to rank i mod P.
std::vector<Runs> turns_by_speed(Index tokens, int ranks, const Speeds& speeds);

/// Contiguous pieces, as long as their ranks are fast.
std::vector<Runs> pieces_by_speed(Index tokens, int ranks, const Speeds& speeds);

}  // namespace dattn
