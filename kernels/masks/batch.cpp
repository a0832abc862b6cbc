#include "kernels/masks/batch.hpp"

#include <cstdint>
#include <stdexcept>

#include "kernels/settings.hpp"

namespace dattn {
namespace {

constexpr std::string_view kForm =
    "batch:sequences=B,new=1,levels=GxL:GxL,sizes=AxB:CxDxE,suffix=S,longest=S,seed=1";
// Far above any batch: every sequence takes memory.
constexpr Index kMostSequences = Index{1} << 20;
constexpr std::size_t kMostLevels = 16;
constexpr Index kMostTokens = Index{1} << 60;  // as Shape has it

[[noreturn]] void fail(const std::string& why) {
  throw std::invalid_argument(why + "; the mask is written " + std::string(kForm));
}

/// Neighbouring sequences that share some keys, group by group: group g is the sequences
/// [sequences[g], sequences[g + 1]) and has the keys [keys[g], keys[g + 1]).
struct Level {
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

/// What a batch is made of; suffixes are its last level, whose groups are single sequences.
struct Tree {
  Index sequences = 0;
  Index fresh = 1;  ///< new tokens of a sequence: its queries, and the last of its keys
  std::vector<Level> levels;

  Index queries() const { return sequences * fresh; }
  Index keys() const { return levels.back().keys.back(); }
};

/// Hydragen (Juravsky et al. 2024, arXiv 2402.05099): sequences that share prefixes, each prefix
/// stored once, as one problem. A query sees the prefixes of its sequence whole, and of the
/// sequence's suffix, whose last tokens are the new ones, the keys up to its own.
class Batch final : public Mask {
 public:
  Batch(Tree tree, Index first_query) : tree_(std::move(tree)), first_(first_query) {}

  bool allows(Index, Index query, Index key) const override {
    if (!rows().contains(query)) return false;
    for (std::size_t n = 0; n < tree_.levels.size(); ++n) {
      if (seen(n, query).contains(key)) return true;
    }
    return false;
  }
  void spans(Index, Index query, Range keys, std::vector<Range>& out) const override {
    if (!rows().contains(query)) return;
    const std::size_t first = out.size();
    for (std::size_t n = 0; n < tree_.levels.size(); ++n) {
      append(out, first, intersect(seen(n, query), keys));
    }
  }
  Cover cover(Index, Range queries, Range keys) const override {
    const Range inside = intersect(queries, rows());
    if (inside.empty() || keys.empty()) return Cover::None;
    const Range sequences{sequence(inside.begin), sequence(inside.end - 1) + 1};
    bool any = false;
    bool all = inside == queries && Range{0, tree_.keys()}.contains(keys);
    for (std::size_t n = 0; n < tree_.levels.size(); ++n) {
      const Level& level = tree_.levels[n];
      const Range part = intersect(keys, level.all_keys());
      if (part.empty()) continue;
      // Groups lie in the order of their sequences, so those with some of these keys have a run of
      // sequences.
      const std::size_t front = level.group_with(part.begin);
      const std::size_t back = level.group_with(part.end - 1);
      const Range met =
          intersect(sequences, {level.sequences_of(front).begin, level.sequences_of(back).end});
      all = all && front == back && level.sequences_of(front).contains(sequences) &&
            seen(n, inside.begin).contains(part);
      // A row sees its group from the first key on, so of these rows the last one sees some if any.
      if (met.empty()) continue;
      const Index last = std::min(inside.end, first_ + met.end * tree_.fresh) - 1;
      any = any || !intersect(seen(n, last), part).empty();
    }
    return !any ? Cover::None : all ? Cover::All : Cover::Some;
  }
  std::string spec() const override {
    std::string levels;
    std::string sizes;
    for (std::size_t n = 0; n + 1 < tree_.levels.size(); ++n) {
      const Level& level = tree_.levels[n];
      levels += (n == 0 ? ",levels=" : ":") + std::to_string(level.groups()) + "x" +
                joined(lengths(level.keys));
      sizes += (n == 0 ? ",sizes=" : ":") + joined(lengths(level.sequences));
    }
    std::string suffix;
    for (const Index n : lengths(tree_.levels.back().keys)) {
      suffix += (suffix.empty() ? ",suffix=" : ":") + std::to_string(n);
    }
    return "batch:sequences=" + std::to_string(tree_.sequences) +
           ",new=" + std::to_string(tree_.fresh) + levels + sizes + suffix;
  }

 private:
  Range rows() const { return {first_, first_ + tree_.queries()}; }
  Index sequence(Index query) const { return (query - first_) / tree_.fresh; }

  /// What a query of rows() sees of a level.
  Range seen(std::size_t n, Index query) const {
    const Level& level = tree_.levels[n];
    const Index s = sequence(query);
    if (n + 1 < tree_.levels.size()) return level.keys_of(level.group_of(s));
    const Range own = level.keys_of(static_cast<std::size_t>(s));
    const Index behind = tree_.fresh - 1 - (query - first_) % tree_.fresh;  // newer ones
    return {own.begin, own.end - behind};
  }
  static std::vector<Index> lengths(const std::vector<Index>& edges) {
    std::vector<Index> found;
    for (std::size_t i = 1; i < edges.size(); ++i) found.push_back(edges[i] - edges[i - 1]);
    return found;
  }

  Tree tree_;
  Index first_;  ///< position of query row 0
};

/// splitmix64 (Steele, Lea, Flood 2014).
std::uint64_t mixed(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31U);
}

/// The next so many keys, behind `edges`.
void extend(std::vector<Index>& edges, Index keys) {
  if (keys > kMostTokens - edges.back()) fail("the keys of the batch pass 2^60");
  edges.push_back(edges.back() + keys);
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

Level level_of(std::vector<Index> words, Index first_key, Index sequences,
               const std::vector<Index>* sizes) {
  const std::string text = joined(words);
  const Index groups = words[0];
  if (groups > sequences) {
    fail("level " + text + " has more groups than the " + std::to_string(sequences) + " sequences");
  }
  words.erase(words.begin());
  if (words.size() == 1) words.resize(static_cast<std::size_t>(groups), words[0]);
  if (std::ssize(words) != groups) {
    fail("level " + text +
         " is not the number of groups and the length of their prefix, or of each");
  }
  if (sizes != nullptr && std::ssize(*sizes) != groups) {
    fail("sizes " + joined(*sizes) + " are not those of " + std::to_string(groups) + " groups");
  }
  Level level{dealt(sequences, groups, sizes), {first_key}};
  if (level.sequences.back() != sequences) {
    fail("sizes " + joined(*sizes) + " are " + std::to_string(level.sequences.back()) +
         " sequences, not " + std::to_string(sequences));
  }
  for (const Index keys : words) extend(level.keys, keys);
  return level;
}

/// The suffixes, from what the settings say of their lengths.
Level suffixes(Settings& settings, const Tree& tree, Index first_key) {
  const std::vector<std::vector<Index>> given = settings.lists("suffix", tree.fresh);
  for (const std::vector<Index>& one : given) {
    if (one.size() != 1) fail("suffix takes one length, or one for each sequence joined by ':'");
  }
  const Index shortest = given.empty() ? tree.fresh : given[0][0];
  const Index longest = settings.count("longest", shortest, shortest);
  const Index seed = settings.count("seed", 1);
  if (given.size() > 1 && std::ssize(given) != tree.sequences) {
    fail("suffix has " + std::to_string(given.size()) + " lengths for " +
         std::to_string(tree.sequences) + " sequences");
  }
  if (given.size() > 1 && longest != shortest) fail("longest goes with one length of suffix");
  Level level{{0}, {first_key}};
  for (Index s = 0; s < tree.sequences; ++s) {
    level.sequences.push_back(s + 1);
    const auto drawn =
        mixed((static_cast<std::uint64_t>(seed) << 20U) + static_cast<std::uint64_t>(s));
    const auto choices = static_cast<std::uint64_t>(longest - shortest + 1);
    extend(level.keys, given.size() > 1 ? given[static_cast<std::size_t>(s)][0]
                                        : shortest + static_cast<Index>(drawn % choices));
  }
  return level;
}

Tree tree_of(std::string_view arguments) {
  Settings settings(arguments, kForm);
  Tree tree;
  tree.sequences = settings.count("sequences", 0);
  tree.fresh = settings.count("new", 1, 1);
  if (tree.sequences < 1 || tree.sequences > kMostSequences) {
    fail("sequences takes a count from 1 to 2^20");
  }
  const std::vector<std::vector<Index>> levels = settings.lists("levels", 1);
  const std::vector<std::vector<Index>> sizes = settings.lists("sizes", 1);
  if (levels.size() > kMostLevels) fail("at most " + std::to_string(kMostLevels) + " levels");
  if (!sizes.empty() && sizes.size() != levels.size()) {
    fail("sizes takes as many lists as there are levels, " + std::to_string(levels.size()));
  }
  Index keys = 0;
  for (std::size_t n = 0; n < levels.size(); ++n) {
    Level level = level_of(levels[n], keys, tree.sequences, sizes.empty() ? nullptr : &sizes[n]);
    for (const Index edge : n == 0 ? std::vector<Index>{} : tree.levels.back().sequences) {
      if (level.sequences[level.group_of(edge)] == edge) continue;
      fail("level " + joined(levels[n]) + " has a group on both sides of sequence " +
           std::to_string(edge) + ", where level " + joined(levels[n - 1]) + " begins a group");
    }
    keys = level.keys.back();
    tree.levels.push_back(std::move(level));
  }
  Level own = suffixes(settings, tree, keys);
  tree.levels.push_back(std::move(own));
  settings.done();
  return tree;
}

Lengths lengths_of(std::string_view arguments) {
  const Tree tree = tree_of(arguments);
  return {tree.queries(), tree.keys()};
}

MaskPtr make(std::string_view arguments, const Shape& shape, const OpenNumbers&) {
  Tree tree = tree_of(arguments);
  if (shape.queries != tree.queries() || shape.keys != tree.keys()) {
    const auto text = [](Index queries, Index keys) {
      return std::to_string(queries) + " queries and " + std::to_string(keys) + " keys";
    };
    throw std::invalid_argument("the batch has " + text(tree.queries(), tree.keys()) +
                                " (sequences * new; prefixes and suffixes), not " +
                                text(shape.queries, shape.keys));
  }
  return std::make_shared<Batch>(std::move(tree), shape.first_query());
}

}  // namespace

MaskKind batch_kind() {
  return {
      "batch",
      kForm,
      "sequences that share prefixes; a query sees those of its sequence, and its suffix causally",
      "sequences * new queries; keys: each prefix once, level by level, then each suffix, new "
      "tokens last",
      make,
      lengths_of};
}

}  // namespace dattn
