#include "kernels/prefix_tree.hpp"

#include <cstdint>

namespace dattn {
namespace {

constexpr std::size_t kMostLevels = 16;
constexpr Index kMostTokens = Index{1} << 60;  // as Shape has it

/// splitmix64 (Steele, Lea, Flood 2014).
std::uint64_t mixed(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31U);
}

/// The next so many keys, behind `before`.
Index behind(const Settings& settings, Index before, Index keys) {
  if (keys > kMostTokens - before) settings.fail("the keys of the batch pass 2^60");
  return before + keys;
}

/// The edges between the groups of a level.
std::vector<Index> dealt(Index sequences, Index groups, const std::vector<Index>* sizes) {
  std::vector<Index> edges{0};
  for (Index g = 0; g < groups; ++g) {
    edges.push_back(sizes == nullptr ? even_part(sequences, groups, g).end
                                     : edges.back() + (*sizes)[static_cast<std::size_t>(g)]);
  }
  return edges;
}

PrefixLevel level_of(const Settings& settings, std::vector<Index> words, Index first_key,
                     Index sequences, const std::vector<Index>* sizes) {
  const std::string text = joined(words);
  const Index groups = words[0];
  if (groups > sequences) {
    settings.fail("level " + text + " has more groups than the " + std::to_string(sequences) +
                  " sequences");
  }
  words.erase(words.begin());
  if (words.size() == 1) words.resize(static_cast<std::size_t>(groups), words[0]);
  if (std::ssize(words) != groups) {
    settings.fail("level " + text +
                  " is not the number of groups and the length of their prefix, or of each");
  }
  if (sizes != nullptr && std::ssize(*sizes) != groups) {
    settings.fail("sizes " + joined(*sizes) + " are not those of " + std::to_string(groups) +
                  " groups");
  }
  PrefixLevel level{dealt(sequences, groups, sizes), {first_key}};
  if (level.sequences.back() != sequences) {
    settings.fail("sizes " + joined(*sizes) + " are " + std::to_string(level.sequences.back()) +
                  " sequences, not " + std::to_string(sequences));
  }
  for (const Index keys : words) level.keys.push_back(behind(settings, level.keys.back(), keys));
  return level;
}

std::vector<Index> suffixes_of(Settings& settings, Index sequences, Index least, Index otherwise) {
  const std::vector<std::vector<Index>> given = settings.lists("suffix", least);
  for (const std::vector<Index>& one : given) {
    if (one.size() != 1) {
      settings.fail("suffix takes one length, or one for each sequence joined by ':'");
    }
  }
  const Index shortest = given.empty() ? otherwise : given[0][0];
  const Index longest = settings.count("longest", shortest, shortest);
  const Index seed = settings.count("seed", 1);
  if (given.size() > 1 && std::ssize(given) != sequences) {
    settings.fail("suffix has " + std::to_string(given.size()) + " lengths for " +
                  std::to_string(sequences) + " sequences");
  }
  if (given.size() > 1 && longest != shortest) {
    settings.fail("longest goes with one length of suffix");
  }
  std::vector<Index> lengths;
  for (Index s = 0; s < sequences; ++s) {
    const auto drawn =
        mixed((static_cast<std::uint64_t>(seed) << 20U) + static_cast<std::uint64_t>(s));
    const auto choices = static_cast<std::uint64_t>(longest - shortest + 1);
    lengths.push_back(given.size() > 1 ? given[static_cast<std::size_t>(s)][0]
                                       : shortest + static_cast<Index>(drawn % choices));
  }
  return lengths;
}

}  // namespace

PrefixTree read_prefix_tree(Settings& settings, Index sequences, Index least, Index otherwise) {
  const std::vector<std::vector<Index>> levels = settings.lists("levels", 1);
  const std::vector<std::vector<Index>> sizes = settings.lists("sizes", 1);
  if (levels.size() > kMostLevels) {
    settings.fail("at most " + std::to_string(kMostLevels) + " levels");
  }
  if (!sizes.empty() && sizes.size() != levels.size()) {
    settings.fail("sizes takes as many lists as there are levels, " +
                  std::to_string(levels.size()));
  }
  PrefixTree tree;
  for (std::size_t n = 0; n < levels.size(); ++n) {
    PrefixLevel level = level_of(settings, levels[n], tree.shared(), sequences,
                                 sizes.empty() ? nullptr : &sizes[n]);
    for (const Index edge : n == 0 ? std::vector<Index>{} : tree.levels.back().sequences) {
      if (level.sequences[level.group_of(edge)] == edge) continue;
      settings.fail("level " + joined(levels[n]) + " has a group on both sides of sequence " +
                    std::to_string(edge) + ", where level " + joined(levels[n - 1]) +
                    " begins a group");
    }
    tree.levels.push_back(std::move(level));
  }
  tree.suffixes = suffixes_of(settings, sequences, least, otherwise);
  Index keys = tree.shared();
  for (const Index own : tree.suffixes) keys = behind(settings, keys, own);
  return tree;
}

}  // namespace dattn
