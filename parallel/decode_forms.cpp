// Decoding, split over ranks by heads, by tokens, or both. By tokens: Helix (Bhatia et al. 2025),
// and the decode context parallelism of serving systems, where each rank makes the queries of its
// own heads and gathers the others'; tree attention (Shyam et al. 2024) as one all-reduce.
#include "parallel/decode_forms.hpp"

#include <algorithm>
#include <array>

#include "parallel/moves.hpp"

namespace dattn {
namespace {

constexpr int kTokens = 0;
constexpr int kHeads = 1;

Ranges all_queries(const Problem& problem) {
  Ranges rows;
  append(rows, {0, problem.queries().tokens()});
  return rows;
}

/// Part `part` of these heads cut into `parts`.
Ranges some_of(const Ranges& heads, int parts, int part) {
  const Range places = even_part(size(heads), parts, part);
  Ranges some;
  Index before = 0;
  for (const Range r : heads) {
    const Range local =
        intersect(Range{places.begin - before, places.end - before}, Range{0, r.size()});
    append(some, {r.begin + local.begin, r.begin + local.end});
    before += r.size();
  }
  return some;
}

/// One rank's share: of the heads those of its column, of the tokens those of its row of ranks.
struct Share {
  std::vector<int> group;     ///< ranks with the same heads, which split the tokens
  std::vector<Ranges> parts;  ///< the query heads that each of them delivers
  Ranges heads;               ///< all of these
  Ranges keys;                ///< rows of the cache

  Share(const Problem& problem, int rank) {
    const Mesh& mesh = problem.mesh();
    group = mesh.group(rank, kTokens);
    const std::vector<int> row = mesh.group(rank, kHeads);
    heads = problem.placement(static_cast<int>(row.size()))
                .heads[static_cast<std::size_t>(mesh.coordinate(rank, kHeads))];
    const int members = static_cast<int>(group.size());
    for (int i = 0; i < members; ++i) parts.push_back(some_of(heads, members, i));
    for (const int other : row) append(keys, problem.keys().rows(other));
  }
};

SlotId cached(Writer& me, Kind kind, const Share& share) {
  return me.slot({kind, heads_touched(kind, share.heads, me.problem().shape()), share.keys});
}

/// The Partials of all of the group, merged in its order; each member gets its own heads.
SlotId merged(Writer& me, const Share& share, SlotId all) {
  const std::size_t members = share.group.size();
  const auto here = static_cast<std::size_t>(place_in(share.group, me.rank()));
  const auto of = [&](std::size_t member) {
    return Block{Kind::O, share.parts[member], me.block(all).rows};
  };
  if (members == 1) return all;
  const SlotId out = me.slot(of(here));
  std::vector<SlotId> arrived;
  for (std::size_t i = 0; i < members; ++i) {
    const SlotId slot = me.slot(of(here));
    me.recv(slot, me.block(slot), share.group[i]);
    arrived.push_back(slot);
  }
  for (std::size_t i = 0; i < members; ++i) {  // everybody starts with another peer
    const std::size_t other = (here + i) % members;
    me.send(all, of(other), share.group[other]);
  }
  for (const SlotId slot : arrived) me.merge(slot, out);
  return out;
}

template <bool gathers, bool merges = true>
Program program(const Problem& problem, int rank) {
  Writer me(problem, rank);
  const Share share(problem, rank);
  const auto here = static_cast<std::size_t>(place_in(share.group, rank));
  const Ranges rows = all_queries(problem);
  const Block whole{Kind::Q, share.heads, rows};
  const bool gathers_here = gathers && share.group.size() > 1;
  const SlotId q = me.slot(gathers_here ? Block{Kind::Q, share.parts[here], rows} : whole);
  const SlotId k = cached(me, Kind::K, share);
  const SlotId v = cached(me, Kind::V, share);
  SlotId all_q = q;
  if (gathers_here) {
    std::vector<Block> made;
    for (const Ranges& part : share.parts) made.push_back({Kind::Q, part, rows});
    all_q = me.slot(whole);
    redistribute(me, share.group, made, std::vector<Block>(made.size(), whole), q, all_q);
  }
  const SlotId all = me.slot({Kind::O, share.heads, rows});
  me.attend(all_q, k, v, all);
  if (!merges) return std::move(me).finish(q, k, v, all, {Kind::O, share.heads, rows});
  const SlotId out = merged(me, share, all);
  return std::move(me).finish(q, k, v, out, {Kind::O, share.parts[here], rows});
}

Program tree(const Problem& problem, int rank) {
  Writer me(problem, rank);
  const Share share(problem, rank);
  const auto here = static_cast<std::size_t>(place_in(share.group, rank));
  const Ranges rows = all_queries(problem);
  const SlotId q = me.slot({Kind::Q, share.heads, rows});
  const SlotId k = cached(me, Kind::K, share);
  const SlotId v = cached(me, Kind::V, share);
  const SlotId out = me.slot({Kind::O, share.heads, rows});
  me.attend(q, k, v, out);
  if (share.group.size() > 1) me.reduce(out, kTokens);
  return std::move(me).finish(q, k, v, out, {Kind::O, share.parts[here], rows});
}

std::optional<std::string> refuses(const Problem& problem) {
  if (problem.mesh().axes.size() == 2) return std::nullopt;
  return "takes a mesh of two axes, tokens x heads, as in --mesh 4x2, not '" +
         problem.mesh().text() + "'";
}
std::optional<std::string> refuses_tokens(const Problem& problem) {
  if (auto why = refuses(problem)) return why;
  if (problem.mesh().axes[kTokens].size == 1) return std::nullopt;
  return "splits no tokens: leave --mesh out, or use --form helix";
}
std::optional<std::string> refuses_heads(const Problem& problem) {
  if (auto why = refuses(problem)) return why;
  if (problem.mesh().axes[kHeads].size == 1) return std::nullopt;
  return "splits no heads of the cache: leave --mesh out, or use --form helix";
}

Mesh by_heads(int ranks, const Shape&) { return {{{"tokens", 1}, {"heads", ranks}}}; }
Mesh by_tokens(int ranks, const Shape&) { return {{{"tokens", ranks}, {"heads", 1}}}; }
/// As many columns as there are key heads to go round.
Mesh by_both(int ranks, const Shape& shape) {
  int columns = 1;
  for (int i = 1; i <= ranks; ++i) {
    if (ranks % i == 0 && i <= shape.key_heads && shape.key_heads % i == 0) columns = i;
  }
  return {{{"tokens", ranks / columns}, {"heads", columns}}};
}

}  // namespace

std::span<const Strategy> decode_forms() {
  static const std::array table{
      Strategy{"heads", "each rank has some heads and the whole cache of their key heads",
               "any ranks (those beyond the query heads stay idle)", "tokens,heads", program<false>,
               nullptr, refuses_tokens, by_heads},
      Strategy{"sequence",
               "each rank has some tokens and makes the queries of some heads; queries are "
               "gathered, Partials merged by heads",
               "any ranks", "tokens,heads", program<true>, nullptr, refuses_heads, by_tokens},
      Strategy{"helix",
               "each rank has some tokens of some key heads and makes the queries of these heads; "
               "Partials are merged by heads",
               "a mesh of two axes, tokens x heads (default: as many columns as key heads divide "
               "into)",
               "tokens,heads", program<false>, nullptr, refuses, by_both},
      Strategy{"tree", "as helix, but one all-reduce merges all heads everywhere",
               "a mesh of two axes, tokens x heads (default: tokens only)", "tokens,heads", tree,
               nullptr, refuses, by_tokens}};
  return table;
}

Program partials_program(const Problem& problem, int rank) {
  return program<true, false>(problem, rank);
}

const Strategy* find_decode_form(std::string_view name) {
  const auto table = decode_forms();
  const auto found =
      std::find_if(table.begin(), table.end(), [&](const Strategy& s) { return s.name == name; });
  return found == table.end() ? nullptr : &*found;
}

}  // namespace dattn
