#pragma once

#include <algorithm>
#include <vector>

#include "kernels/settings.hpp"

namespace dattn {

/// Neighbouring sequences of a batch that share some keys, group by group: group g is the sequences
/// [sequences[g], sequences[g + 1]) and has the keys [keys[g], keys[g + 1]).
struct PrefixLevel {
  std::vector<Index> sequences;
  std::vector<Index> keys;

  Range all_keys() const { return {keys.front(), keys.back()}; }
  std::size_t groups() const { return keys.size() - 1; }
  Range sequences_of(std::size_t g) const { return {sequences[g], sequences[g + 1]}; }
  Range keys_of(std::size_t g) const { return {keys[g], keys[g + 1]}; }
  /// @pre the sequence, the key is in some group
  std::size_t group_of(Index sequence) const { return place(sequences, sequence); }
  std::size_t group_with(Index key) const { return place(keys, key); }

 private:
  static std::size_t place(const std::vector<Index>& edges, Index x) {
    const auto next = std::upper_bound(edges.begin(), edges.end(), x);
    return static_cast<std::size_t>(next - edges.begin()) - 1;
  }
};

/// What the sequences of a batch share, and what they do not. Keys of the first level begin at 0,
/// those of the next behind them; each group lies within one of the level before.
/// Source: Hydragen (Juravsky et al. 2024, arXiv 2402.05099).
struct PrefixTree {
  std::vector<PrefixLevel> levels;  ///< of prefixes; may be none
  std::vector<Index> suffixes;      ///< keys of its own, of each sequence

  /// Keys of all prefixes.
  Index shared() const { return levels.empty() ? 0 : levels.back().keys.back(); }
};

/// The tree that the settings levels, sizes, suffix, longest and seed say, for so many sequences
/// whose suffixes have `least` keys or more, and `otherwise` where none is set. Throws
/// std::invalid_argument as Settings does.
PrefixTree read_prefix_tree(Settings& settings, Index sequences, Index least, Index otherwise);

}  // namespace dattn
