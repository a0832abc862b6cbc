#include "parallel/schedule.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "kernels/area.hpp"
#include "parallel/pairs.hpp"

namespace dattn {
namespace {

/// Whether some group of heads that see the same keys has all of these.
bool see_the_same(const Problem& problem, Range heads) {
  const auto& groups = problem.head_groups();
  return std::any_of(groups.begin(), groups.end(), [&](Range g) { return g.contains(heads); });
}

/// Steps from the rank that a piece is shared with to the one that computes it, around the ring.
int distance(const Piece& piece, int ranks) {
  const int from = piece.at == piece.queries ? piece.keys : piece.queries;
  return (piece.at - from + ranks) % ranks;
}

/// Adds `next` to `piece` if that costs no message more than it has.
bool join(const Problem& problem, Piece& piece, const Piece& next) {
  if (std::tie(piece.at, piece.last, piece.queries, piece.keys, piece.rows, piece.heads.end) !=
      std::tie(next.at, next.last, next.queries, next.keys, next.rows, next.heads.begin)) {
    return false;
  }
  const Range both{piece.heads.begin, next.heads.end};
  if (piece.at != piece.keys && !see_the_same(problem, both)) return false;
  piece.heads = both;
  piece.pairs += next.pairs;
  return true;
}

/// Of its rank for the piece, at least 1.
Index time_of(const Problem& problem, const Piece& piece) {
  if (problem.speeds().equal()) return piece.pairs;
  const double pairs = static_cast<double>(piece.pairs) / problem.speeds().of(piece.at);
  return std::max<Index>(1, std::llround(pairs));
}

/// Takes from the most loaded ranks and gives to the least loaded.
class Evening {
 public:
  Evening(const Problem& problem, Pass pass)
      : problem_(problem),
        pass_(pass),
        ranks_(problem.ranks()),
        counter_(problem),
        unit_(std::lcm(problem.shape().query_heads / problem.shape().key_heads,
                       problem.shape().query_heads / problem.shape().value_heads)),
        load_(static_cast<std::size_t>(ranks_), 0),
        at_(load_.size()) {
    start();
    set_goals(std::accumulate(load_.begin(), load_.end(), Index{0}));
  }

  std::vector<Piece> run() {
    give_to_other_owners();
    give_to_anyone();
    if (sums_travel()) leave_half_for_the_end();
    return std::move(pieces_);
  }

 private:
  using Id = std::size_t;

  /// Loads this part of the mean apart count as even: a finer cut would cost more than it wins.
  static constexpr Index kSlack = 1000;

  /// What each rank should compute of `total`: as much as it is fast.
  void set_goals(Index total) {
    const Speeds& speeds = problem_.speeds();
    goal_.assign(load_.size(), (total + ranks_ - 1) / ranks_);
    if (!speeds.equal()) {
      double all = 0;
      for (int r = 0; r < ranks_; ++r) all += speeds.of(r);
      for (int r = 0; r < ranks_; ++r) {
        goal(r) = std::llround(std::ceil(static_cast<double>(total) * speeds.of(r) / all));
      }
    }
    slack_ = *std::min_element(goal_.begin(), goal_.end()) / kSlack;
  }

  Index& load(int rank) { return load_[static_cast<std::size_t>(rank)]; }
  Index& goal(int rank) { return goal_[static_cast<std::size_t>(rank)]; }
  bool loaded(int rank) { return load(rank) > goal(rank) + slack_; }
  bool idle(int rank) { return load(rank) < goal(rank) - slack_; }
  /// For how long what it has keeps it busy, in pairs of the fastest rank.
  double busy(int rank) { return static_cast<double>(load(rank)) / problem_.speeds().of(rank); }

  Index count(const Piece& p) {
    return counter_.count({p.heads}, {p.rows}, {problem_.keys().rows(p.keys)});
  }

  /// Everybody computes for the queries that it owns; or, backward and if that moves fewer bytes,
  /// for the keys.
  void start() {
    std::vector<Piece> by_queries;
    for (int r = 0; r < ranks_; ++r) own_queries(r, by_queries);
    std::vector<Piece> by_keys;
    if (pass_ == Pass::backward) {
      by_keys = by_queries;
      for (Piece& piece : by_keys) {
        piece.at = piece.keys;
        if (piece.keys != piece.queries) trim(piece);
      }
    }
    const auto bytes = [&](const std::vector<Piece>& pieces) {
      return std::accumulate(pieces.begin(), pieces.end(), Index{0},
                             [&](Index sum, const Piece& p) { return sum + bytes_moved(p, p.at); });
    };
    const bool keys = !by_keys.empty() && bytes(by_keys) < bytes(by_queries);
    for (const Piece& piece : keys ? by_keys : by_queries) add(piece);
  }

  void own_queries(int rank, std::vector<Piece>& pieces) {
    const Range rows = problem_.queries().rows(rank);
    if (rows.empty()) return;
    for (int keys = 0; keys < ranks_; ++keys) {
      for (std::size_t g = 0; g < problem_.head_groups().size(); ++g) {
        if (!problem_.keys().has_at(keys, problem_.keys_needed(rank, g))) continue;
        Piece piece{rank, rank, keys, problem_.head_groups()[g], rows};
        piece.pairs = count(piece);
        if (piece.pairs > 0) pieces.push_back(piece);
      }
    }
  }

  Id add(const Piece& piece) {
    pieces_.push_back(piece);
    at_[static_cast<std::size_t>(piece.at)].push_back(pieces_.size() - 1);
    load(piece.at) += piece.pairs;
    return pieces_.size() - 1;
  }

  // ---- who gives what to whom ------------------------------------------------------------------

  /// Whoever owns the other half of what a piece is about.
  static int other_owner(const Piece& piece) {
    return piece.at == piece.queries ? piece.keys : piece.queries;
  }

  void give_to_other_owners() {
    std::vector<int> givers(static_cast<std::size_t>(ranks_));
    std::iota(givers.begin(), givers.end(), 0);
    std::stable_sort(givers.begin(), givers.end(), [&](int a, int b) { return busy(a) > busy(b); });
    for (const int giver : givers) {
      if (!loaded(giver)) break;
      // To those with least to do first: whoever has most to give finds room for all of it so, if
      // anybody does (as in the theorem of Gale and Ryser).
      std::vector<Id> order = at_[static_cast<std::size_t>(giver)];
      std::stable_sort(order.begin(), order.end(), [&](Id a, Id b) {
        const Piece& p = pieces_[a];
        const Piece& q = pieces_[b];
        return std::pair(busy(other_owner(p)), q.pairs) < std::pair(busy(other_owner(q)), p.pairs);
      });
      for (const Id id : order) {
        const int helper = other_owner(pieces_[id]);
        if (!loaded(giver)) break;
        if (helper != giver && idle(helper)) give(id, helper);
      }
    }
  }

  void give_to_anyone() {
    std::vector<int> all(static_cast<std::size_t>(ranks_));
    std::iota(all.begin(), all.end(), 0);
    for (int turn = 0; turn < 4 * ranks_; ++turn) {
      const auto less = [&](int a, int b) { return busy(a) < busy(b); };
      const int giver = *std::max_element(all.begin(), all.end(), less);
      const int helper = *std::min_element(all.begin(), all.end(), less);
      if (!loaded(giver) || !idle(helper)) return;
      std::vector<std::pair<Index, Id>> order;
      for (const Id id : at_[static_cast<std::size_t>(giver)]) {
        order.emplace_back(-pairs_per_kib(pieces_[id], helper), id);
      }
      std::sort(order.begin(), order.end());
      bool given = false;
      for (const auto& [gain, id] : order) {
        if (loaded(giver) && idle(helper)) given = give(id, helper) || given;
      }
      if (!given) return;
    }
  }

  /// Bytes that travel if `rank` computes the piece.
  Index bytes_moved(const Piece& piece, int rank) const {
    Index sum = 0;
    const auto add = [&](const Side& side, const Ranges& rows) {
      for (const auto kinds : {side.inputs, side.sums}) {
        for (const Kind kind : kinds) {
          const Range heads = heads_touched(kind, piece.heads, problem_.shape());
          sum += wire_bytes(Block{kind, heads, rows}, problem_);
        }
      }
    };
    if (rank != piece.queries) add(query_side(pass_), {piece.rows});
    if (rank != piece.keys) add(key_side(pass_), keys_of(problem_, piece));
    return sum;
  }

  /// How much work a message buys, if all of the piece goes to `helper`. An integer, so that all
  /// ranks agree whatever machine they are on.
  Index pairs_per_kib(const Piece& piece, int helper) const {
    const Index more = bytes_moved(piece, helper) - bytes_moved(piece, piece.at);
    return piece.pairs * 1024 / std::max<Index>(more, 1);
  }

  // ---- giving ----------------------------------------------------------------------------------

  /// Hands over of the piece as much as makes its rank or `helper` even; whether that was any.
  bool give(Id id, int helper) {
    const int giver = pieces_[id].at;
    const Index want = std::min(load(giver) - goal(giver), goal(helper) - load(helper));
    const Piece whole = pieces_[id];
    if (whole.pairs <= want + slack_) {
      move(id, helper);
      return true;
    }
    // Between heads each side reads its own heads of K and V, so that a cut costs no byte.
    const Piece part = last_heads(whole, want);
    Index given = 0;
    if (part.pairs > 0) given += split(id, part, helper);
    if (want - given <= slack_) return given > 0;
    // The rest between rows of one unit. Later rows see more keys, under causal masks.
    Piece unit = pieces_[id];
    unit.heads.begin = unit.heads.end - unit_;
    const Piece rows = last_rows(unit, want - given);
    if (rows.pairs == 0) return given > 0;
    if (unit.heads != pieces_[id].heads) {
      unit.pairs = count(unit);
      split(id, unit, unit.at);
      id = pieces_.size() - 1;
    }
    given += split(id, rows, helper);
    return true;
  }

  /// As many of the last heads as have about `want` pairs at most, never all.
  Piece last_heads(const Piece& whole, Index want) {
    Piece part = whole;
    part.heads.begin = part.heads.end;
    part.pairs = 0;
    while (part.heads.begin - unit_ > whole.heads.begin) {
      Piece unit = whole;
      unit.heads = {part.heads.begin - unit_, part.heads.begin};
      const Index pairs = count(unit);
      if (part.pairs + pairs > want + slack_) break;
      part.heads.begin -= unit_;
      part.pairs += pairs;
    }
    return part;
  }

  /// Likewise of the last rows.
  Piece last_rows(const Piece& whole, Index want) {
    Range edge = whole.rows;  // the first row of them lies in here
    Piece part = whole;
    while (edge.size() > 1) {
      part.rows.begin = edge.begin + edge.size() / 2;
      (count(part) > want + slack_ ? edge.begin : edge.end) = part.rows.begin;
    }
    part.rows.begin = edge.end;
    part.pairs = part.rows.empty() ? 0 : count(part);
    return part;
  }

  bool sums_travel() const {
    return std::any_of(pieces_.begin(), pieces_.end(), [&](const Piece& p) {
      return p.at != p.queries || (pass_ == Pass::backward && p.at != p.keys);
    });
  }

  /// Of what ranks compute for their own queries and keys, which needs no message, half is for when
  /// there is nothing but it to hide the last sums behind that go home.
  void leave_half_for_the_end() {
    for (int rank = 0; rank < ranks_; ++rank) {
      std::vector<Id> own;
      Index want = 0;
      for (const Id id : at_[static_cast<std::size_t>(rank)]) {
        if (pieces_[id].queries != rank || pieces_[id].keys != rank) continue;
        own.push_back(id);
        want += pieces_[id].pairs;
      }
      want /= 2;
      for (; !own.empty() && pieces_[own.back()].pairs <= want; own.pop_back()) {
        pieces_[own.back()].last = true;
        want -= pieces_[own.back()].pairs;
      }
      if (own.empty()) continue;
      const Piece& whole = pieces_[own.back()];
      Piece part = whole.heads.size() > unit_ ? last_heads(whole, want) : last_rows(whole, want);
      if (part.pairs == 0) continue;
      part.last = true;
      split(own.back(), part, rank);
    }
  }

  /// Cuts `part`, the last heads or the last rows of piece `id`, off and has `rank` compute it.
  Index split(Id id, Piece part, int rank) {
    Piece& rest = pieces_[id];
    load(rest.at) -= part.pairs;
    rest.pairs -= part.pairs;
    if (part.heads == rest.heads) {
      rest.rows.end = part.rows.begin;
    } else {
      rest.heads.end = part.heads.begin;
    }
    const Id cut = add(part);
    if (rank != part.at) move(cut, rank);
    return part.pairs;
  }

  void move(Id id, int helper) {
    Piece& piece = pieces_[id];
    load(piece.at) -= piece.pairs;
    load(helper) += piece.pairs;
    std::erase(at_[static_cast<std::size_t>(piece.at)], id);
    at_[static_cast<std::size_t>(helper)].push_back(id);
    piece.at = helper;
    trim(piece);
  }

  /// Leaves the rows before the first and behind the last that see any of the keys.
  void trim(Piece& piece) const {
    const auto sees = [&](Range rows) {
      const Runs queries = problem_.queries().positions({rows});
      const Runs keys = problem_.keys().positions({problem_.keys().rows(piece.keys)});
      const auto heads = variants(problem_.mask(), piece.heads);
      return std::any_of(heads.begin(), heads.end(), [&](const auto& head) {
        return allowed_pair(problem_.mask(), head.first, queries, keys).has_value();
      });
    };
    Range& rows = piece.rows;
    if (!sees({rows.begin, rows.begin + 1})) {
      Range edge = rows;  // holds the first row that sees one
      while (edge.size() > 1) {
        const Index half = edge.begin + edge.size() / 2;
        (sees({rows.begin, half}) ? edge.end : edge.begin) = half;
      }
      rows.begin = edge.begin;
    }
    if (!sees({rows.end - 1, rows.end})) {
      Range edge = rows;  // holds the last one
      while (edge.size() > 1) {
        const Index half = edge.begin + edge.size() / 2;
        (sees({half, rows.end}) ? edge.begin : edge.end) = half;
      }
      rows.end = edge.end;
    }
  }

  const Problem& problem_;
  const Pass pass_;
  const int ranks_;
  PairCounter counter_;
  Index unit_;  ///< query heads that share a key or a value head
  Index slack_ = 0;
  std::vector<Piece> pieces_;
  std::vector<Index> load_;
  std::vector<Index> goal_;          ///< by rank
  std::vector<std::vector<Id>> at_;  ///< pieces of each rank
};

}  // namespace

Ranges keys_of(const Problem& problem, const Piece& piece) {
  const auto& groups = problem.head_groups();
  const bool whole = piece.rows == problem.queries().rows(piece.queries);
  std::vector<Range> rows;
  const auto add = [&](const Ranges& some) { rows.insert(rows.end(), some.begin(), some.end()); };
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const Range heads = intersect(groups[g], piece.heads);
    if (heads.empty()) continue;
    if (whole) {
      add(problem.keys().rows_at(piece.keys, problem.keys_needed(piece.queries, g)));
      continue;
    }
    for (const auto& [head, times] : variants(problem.mask(), heads)) {
      add(intersect(*problem.partners(true, head, piece.rows),
                    Ranges{problem.keys().rows(piece.keys)}));
    }
  }
  return union_of(std::move(rows));
}

Schedule::Schedule(const Problem& problem, std::vector<Piece> pieces)
    : elsewhere_(static_cast<std::size_t>(problem.ranks())) {
  const auto place = [&](const Piece& p) {
    return std::tuple(p.at, p.last, distance(p, problem.ranks()), p.queries, p.keys, p.rows,
                      p.heads);
  };
  std::sort(pieces.begin(), pieces.end(),
            [&](const Piece& a, const Piece& b) { return place(a) < place(b); });
  for (const Piece& piece : pieces) {
    if (pieces_.empty() || !join(problem, pieces_.back(), piece)) pieces_.push_back(piece);
  }
  first_.push_back(0);
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    Piece& piece = pieces_[i];
    while (first_.size() <= static_cast<std::size_t>(piece.at)) first_.push_back(i);
    if (i > first_.back()) piece.begin = pieces_[i - 1].end();
    piece.takes = time_of(problem, piece);
    for (const int rank : {piece.queries, piece.keys}) {
      auto& list = elsewhere_[static_cast<std::size_t>(rank)];
      if (rank != piece.at && (list.empty() || list.back() != i)) list.push_back(i);
    }
  }
  first_.resize(elsewhere_.size() + 1, pieces_.size());
}

std::span<const Piece> Schedule::at(int rank) const {
  const auto r = static_cast<std::size_t>(rank);
  return std::span(pieces_).subspan(first_[r], first_[r + 1] - first_[r]);
}

Index Schedule::posted(std::size_t number, int ahead) const {
  const std::size_t first = first_[static_cast<std::size_t>(pieces_[number].at)];
  return pieces_[number - std::min(number - first, static_cast<std::size_t>(ahead))].begin;
}

Index Schedule::total() const {
  return std::accumulate(pieces_.begin(), pieces_.end(), Index{0},
                         [](Index sum, const Piece& p) { return sum + p.pairs; });
}

Index Schedule::most() const {
  Index most = 0;
  for (const Piece& piece : pieces_) most = std::max(most, piece.end());
  return most;
}

Schedule even_schedule(const Problem& problem, Pass pass) {
  return Schedule(problem, Evening(problem, pass).run());
}

}  // namespace dattn
