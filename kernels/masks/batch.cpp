#include "kernels/masks/batch.hpp"

#include <stdexcept>

#include "kernels/prefix_tree.hpp"
#include "kernels/settings.hpp"

namespace dattn {
namespace {

constexpr std::string_view kForm =
    "batch:sequences=B,new=1,levels=GxL:GxL,sizes=AxB:CxDxE,suffix=S,longest=S,seed=1";
// Far above any batch: every sequence takes memory.
constexpr Index kMostSequences = Index{1} << 20;

/// What a batch is made of; suffixes are its last level, whose groups are single sequences.
struct Tree {
  Index sequences = 0;
  Index fresh = 1;  ///< new tokens of a sequence: its queries, and the last of its keys
  std::vector<PrefixLevel> levels;

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
      const PrefixLevel& level = tree_.levels[n];
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
      const PrefixLevel& level = tree_.levels[n];
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
    const PrefixLevel& level = tree_.levels[n];
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

Tree tree_of(std::string_view arguments) {
  Settings settings(arguments, kForm);
  Tree tree;
  tree.sequences = settings.count("sequences", 0);
  tree.fresh = settings.count("new", 1, 1);
  if (tree.sequences < 1 || tree.sequences > kMostSequences) {
    settings.fail("sequences takes a count from 1 to 2^20");
  }
  PrefixTree read = read_prefix_tree(settings, tree.sequences, tree.fresh, tree.fresh);
  settings.done();
  PrefixLevel own{{0}, {read.shared()}};
  for (Index s = 0; s < tree.sequences; ++s) {
    own.sequences.push_back(s + 1);
    own.keys.push_back(own.keys.back() + read.suffixes[static_cast<std::size_t>(s)]);
  }
  tree.levels = std::move(read.levels);
  tree.levels.push_back(std::move(own));
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
