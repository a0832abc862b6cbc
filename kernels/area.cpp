#include "kernels/area.hpp"

#include <algorithm>
#include <map>

#include "kernels/bands.hpp"
#include "kernels/step.hpp"

namespace dattn {
namespace {

/// Up to this many queries, counting row by row beats cutting further.
constexpr Index kFewRows = 8;
/// Where rows see as many spans, and not the same, they are counted whole. Two of so many rows are
/// asked about that.
constexpr std::size_t kManySpans = 4;
constexpr Index kRowsToAsk = 32;
/// Up to this many bands of a chain are looked at one by one.
constexpr std::size_t kFewBands = 8;

/// Whether two queries see many spans of the keys, few of them the same: as on a grid, where every
/// piece of the keys would be cut by the edge of the mask down to the smallest.
bool many_own_spans(const Mask& mask, Index head, Index a, Index b, Range keys,
                    std::vector<Range>& scratch) {
  scratch.clear();
  mask.spans(head, a, keys, scratch);
  const auto of_a = std::ssize(scratch);
  if (scratch.size() < kManySpans) return false;
  mask.spans(head, b, keys, scratch);
  const auto of_b = std::ssize(scratch) - of_a;
  const auto middle = scratch.begin() + of_a;
  Index shared = 0;
  for (auto i = scratch.begin(), j = middle; i != middle && j != scratch.end();) {
    shared += *i == *j ? 1 : 0;
    if (i->begin <= j->begin) {
      ++i;
    } else {
      ++j;
    }
  }
  return of_b >= static_cast<std::ptrdiff_t>(kManySpans) && 2 * shared < std::min(of_a, of_b);
}

/// Visits the rectangle `q` x `k` in pieces: all(q, k) for pieces that are allowed whole, alike(q,
/// members of k, k) for rows that see the same. A visitor that returns true ends the visit.
/// `whole_rows`: keys are not cut.
template <class All, class Alike>
bool visit(const Mask& mask, Index head, Run q, Run k, const All& all, const Alike& alike,
           std::vector<Range>& scratch, bool whole_rows = false) {
  if (q.count == 0 || k.count == 0) return false;
  // The bounds of a strided run hold more positions than the run: None and All stay true of it.
  switch (mask.cover(head, q.bounds(), k.bounds())) {
    case Cover::None:
      return false;
    case Cover::All:
      return all(q, k);
    case Cover::Some:
      break;
  }
  const Index same = mask.alike(head, q.first, k.bounds());
  const auto rows = [&](Run part) {
    scratch.clear();
    mask.members(head, part.first, k, scratch);
    return alike(part, scratch, k);
  };
  if (same >= q.bounds().size()) return rows(q);
  if (q.count <= kFewRows) {
    for (Index i = 0; i < q.count;) {
      const Index same_rows = (mask.alike(head, q.at(i), k.bounds()) - 1) / q.step + 1;
      const Index end = i + std::min(same_rows, q.count - i);
      if (rows(q.part({i, end}))) return true;
      i = end;
    }
    return false;
  }
  if (const Index rows_alike = (same - 1) / q.step + 1; rows_alike > kFewRows) {
    const Index cut = std::max(rows_alike, q.count / 2 / rows_alike * rows_alike);
    return visit(mask, head, q.part({0, cut}), k, all, alike, scratch, whole_rows) ||
           visit(mask, head, q.part({cut, q.count}), k, all, alike, scratch, whole_rows);
  }
  // Cut the longer side, so that pieces stay square and leave the mask's edge soon. Measured by
  // bounds: a single row is 1 long whatever its step, so what is cut has two rows or more.
  const Index half = q.count / 2;
  const auto many_own = [&](Index other) {  // neighbours in a corner of a grid see the same
    return many_own_spans(mask, head, q.at(half), q.at(other), k.bounds(), scratch);
  };
  // Nothing is seen whole within the bounds of strided keys: there is no edge to leave.
  whole_rows = whole_rows || k.step > 1;
  const bool longer = q.bounds().size() >= k.bounds().size();
  if (!longer && !whole_rows && q.count >= kRowsToAsk) {
    whole_rows = many_own(half - 1) || many_own(0);
  }
  if (longer || whole_rows) {
    return visit(mask, head, q.part({0, half}), k, all, alike, scratch, whole_rows) ||
           visit(mask, head, q.part({half, q.count}), k, all, alike, scratch, whole_rows);
  }
  const Index middle = k.count / 2;
  return visit(mask, head, q, k.part({0, middle}), all, alike, scratch, whole_rows) ||
         visit(mask, head, q, k.part({middle, k.count}), all, alike, scratch, whole_rows);
}

}  // namespace

bool dense(const Runs& runs) { return dense(bands_of(runs)); }

RowSpans::RowSpans(const Mask& mask, Index head, const Runs& queries, Range keys, Index step)
    : step_(step) {
  constexpr Index kMostRests = Index{1} << 16;  // more than there are ranks to deal keys to
  if (step <= kMostRests) rests_.resize(static_cast<std::size_t>(step), 0);
  struct Open {
    Range span;
    Index since;  ///< the first of the rows before, side by side, that see it
  };
  std::vector<Range> spans;
  std::vector<Open> before;
  std::vector<Open> now;
  Index row = 0;
  const auto tally = [&](const Edge& e, Index times) {
    if (rests_.empty()) return;
    quotients_ += times * e.quotient;
    rests_[static_cast<std::size_t>(e.rest)] += times;
  };
  const auto close = [&](const Open& open) {
    begins_.push_back(edge(open.span.begin));
    ends_.push_back(edge(open.span.end));
    rows_.push_back({open.since, row});
    tally(begins_.back(), -rows_.back().size());
    tally(ends_.back(), rows_.back().size());
    last_ = std::max(last_, open.span.end);
  };
  for (const Run& run : queries) {
    for (Index i = 0; i < run.count; ++i, ++row) {
      spans.clear();
      mask.spans(head, run.at(i), keys, spans);
      now.clear();
      auto old = before.begin();
      for (const Range span : spans) {
        while (old != before.end() && old->span < span) close(*old++);
        const bool stays = old != before.end() && old->span == span;
        now.push_back({span, stays ? (old++)->since : row});
      }
      while (old != before.end()) close(*old++);
      std::swap(before, now);
    }
  }
  for (const Open& open : before) close(open);
}

Index RowSpans::seeing(const Runs& keys) const {
  const Members members(bands_of(keys));
  std::vector<Range> rows;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (members.below(position(ends_[i])) > members.below(position(begins_[i]))) {
      rows.push_back(rows_[i]);
    }
  }
  return size(union_of(std::move(rows)));
}

Index RowSpans::area(const Runs& keys) const {
  const auto over_edges = [&](const auto& below) {  // of all ends less all begins
    Index sum = 0;
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      sum += rows_[i].size() * (below(ends_[i]) - below(begins_[i]));
    }
    return sum;
  };
  const std::vector<Band> bands = bands_of(keys);
  if (bands.size() > kFewBands) {
    const Members members(bands);
    if (bands.size() > kFewBands * members.chains()) {
      return over_edges([&](const Edge& e) { return members.below(position(e)); });
    }
  }
  Index sum = 0;
  for (const Band& band : bands) {
    if (!rests_.empty() && band.step == step_ && band.first + band.width <= step_ &&
        band.first + band.rounds * step_ >= last_) {
      // Of an edge `width` members for each round below it, and those of its own round.
      sum += quotients_ * band.width;
      for (Index rest = band.first + 1; rest < step_; ++rest) {
        sum += rests_[static_cast<std::size_t>(rest)] * std::min(rest - band.first, band.width);
      }
      continue;
    }
    if (band.rounds == 1 || band.step != step_) {
      sum += over_edges([&](const Edge& e) { return band.below(position(e)); });
      continue;
    }
    const Index quotient = band.first / step_;
    const Index rest = band.first % step_;
    sum += over_edges([=, step = step_](const Edge& e) {  // as above; the division is done already
      const Index wrap = e.rest < rest ? 1 : 0;
      const Index i = e.quotient - quotient - wrap;
      const Index j = std::min(e.rest - rest + wrap * step, band.width);
      return i < 0 ? 0 : i >= band.rounds ? band.size() : i * band.width + j;
    });
  }
  return sum;
}

namespace {

/// Of the rows at `queries`, for keys that lie apart.
RowSpans spans_for(const Mask& mask, Index head, const Runs& queries,
                   const std::vector<Band>& keys) {
  Range bounds = keys.front().bounds();
  for (const Band& b : keys) {
    bounds.begin = std::min(bounds.begin, b.bounds().begin);
    bounds.end = std::max(bounds.end, b.bounds().end);
  }
  return RowSpans(mask, head, queries, bounds, keys.back().step);
}

/// f(queries, keys) of each residue of both: under a mask that has a step (Mask::step) those see
/// each other only, in spans that are whole.
template <class F>
void each_residue(const Runs& queries, const Runs& keys, Index step, const F& f) {
  for (const auto& [residue, of_q] : by_residue(queries, step)) {
    f(of_q, step == 1 ? keys : of_residue(keys, step, residue));
  }
}

}  // namespace

Index area(const Mask& mask, Index head, const Runs& queries, const Runs& keys) {
  const std::vector<Band> q_bands = bands_of(queries);
  const std::vector<Band> k_bands = bands_of(keys);
  if (dense(q_bands) && dense(k_bands) && mask.pairs(head, {0, 0}, {0, 0})) {
    Index sum = 0;
    for (const Band& q : q_bands) {
      for (const Band& k : k_bands) sum += *mask.pairs(head, q.bounds(), k.bounds());
    }
    return sum;
  }
  const Index step = mask.step(head);
  if (!dense(k_bands) && step == 1) return spans_for(mask, head, queries, k_bands).area(keys);
  Index sum = 0;
  std::vector<Range> scratch;
  const auto all = [&](Run q, Run k) {
    sum += q.count * k.count;
    return false;
  };
  const auto alike = [&](Run q, const std::vector<Range>& members, const Run&) {
    for (const Range some : members) sum += q.count * some.size();
    return false;
  };
  each_residue(dense(q_bands) ? runs_of(q_bands) : queries,
               dense(k_bands) ? runs_of(k_bands) : keys, step,
               [&](const Runs& of_q, const Runs& of_k) {
                 for (const Run& q : of_q) {
                   for (const Run& k : of_k) visit(mask, head, q, k, all, alike, scratch);
                 }
               });
  return sum;
}

std::optional<Pair> allowed_pair(const Mask& mask, Index head, const Runs& queries,
                                 const Runs& keys) {
  std::optional<Pair> found;
  std::vector<Range> scratch;
  const auto all = [&](Run q, Run k) {
    found = Pair{q.first, k.first};
    return true;
  };
  const auto alike = [&](Run q, const std::vector<Range>& members, Run k) {
    if (members.empty()) return false;
    found = Pair{q.first, k.at(members.front().begin)};
    return true;
  };
  for (const Run& q : queries) {
    for (const Run& k : keys) {
      if (visit(mask, head, q, k, all, alike, scratch)) return found;
    }
  }
  return found;
}

namespace {

/// Takes the keys that `query` sees out of `keys`, ascending members of `all`.
void take_out_seen(const Mask& mask, Index head, Index query, const Run& all,
                   std::vector<Range>& keys, std::vector<Range>& scratch) {
  std::vector<Range> left;
  left.reserve(keys.size());
  for (Range some : keys) {
    const Index keys_from = some.begin;  // what members are counted from
    scratch.clear();
    mask.members(head, query, all.part(some), scratch);
    for (Range seen : scratch) {
      seen = {keys_from + seen.begin, keys_from + seen.end};
      if (some.begin < seen.begin) left.push_back({some.begin, seen.begin});
      some.begin = seen.end;
    }
    if (!some.empty()) left.push_back(some);
  }
  keys = std::move(left);
}

/// Takes what any of `queries` sees out of `keys`, members of `all` that none of other rows sees.
/// So rows are asked only for what those before them, the last one of all first, have left open,
/// and not one by one where all of them see nothing of it.
void take_out_seen(const Mask& mask, Index head, Run queries, const Run& all,
                   std::vector<Range>& keys, std::vector<Range>& scratch) {
  const Range bounds = queries.bounds();
  std::vector<Range> open;
  std::vector<Range> unseen;
  for (const Range some : keys) {
    switch (mask.cover(head, bounds, all.part(some).bounds())) {
      case Cover::None:
        unseen.push_back(some);
        break;
      case Cover::Some:
        open.push_back(some);
        break;
      case Cover::All:
        break;
    }
  }
  while (queries.count > 0 && !open.empty()) {
    take_out_seen(mask, head, queries.at(queries.count - 1), all, open, scratch);
    --queries.count;
    if (queries.count <= kFewRows) continue;
    const Index half = queries.count / 2;
    take_out_seen(mask, head, queries.part({0, half}), all, open, scratch);
    queries = queries.part({half, queries.count});
    take_out_seen(mask, head, queries, all, open, scratch);
    break;
  }
  const auto middle = static_cast<std::ptrdiff_t>(unseen.size());
  unseen.insert(unseen.end(), open.begin(), open.end());
  std::inplace_merge(unseen.begin(), unseen.begin() + middle, unseen.end());
  keys = std::move(unseen);
}

}  // namespace

Ranges keys_seen(const Mask& mask, Index head, const Runs& queries, Index keys) {
  if (keys == 0) return {};
  const Index step = mask.step(head);
  std::vector<Range> seen;
  std::vector<Range> unseen;
  std::vector<Range> scratch;
  each_residue(queries, {{0, keys, 1}}, step, [&](const Runs& of_q, const Runs& of_k) {
    for (const Run& all : of_k) {
      unseen.assign(1, {0, all.count});
      for (const Run& run : of_q) {
        if (run.count > 0) take_out_seen(mask, head, run, all, unseen, scratch);
      }
      unseen.push_back({all.count, all.count});
      Index from = 0;
      for (const Range r : unseen) {
        if (all.step == 1) append(seen, 0, {from, r.begin});
        for (Index i = from; i < r.begin && all.step > 1; ++i) {
          seen.push_back({all.at(i), all.at(i) + 1});
        }
        from = r.end;
      }
    }
  });
  return union_of(std::move(seen));
}

namespace {

/// Adds the members `part` of `queries`, counted from its first, that see a key of the run `keys`.
void add_seeing(const Mask& mask, Index head, const Run& queries, Range part, const Run& keys,
                std::vector<Range>& out, std::vector<Range>& scratch) {
  if (part.empty() || keys.count == 0) return;
  const Range bounds = queries.part(part).bounds();
  const auto sees_all = [&](Index key) {
    return mask.cover(head, bounds, {key, key + 1}) == Cover::All;
  };
  const auto sees = [&](Index row) {
    scratch.clear();
    mask.members(head, row, keys, scratch);
    return !scratch.empty();
  };
  const Cover all = mask.cover(head, bounds, keys.bounds());
  if (all == Cover::None) return;
  if (all == Cover::All || sees_all(keys.first) || sees_all(keys.at(keys.count - 1))) {
    append(out, 0, part);
    return;
  }
  const Run run = queries.part(part);
  if (mask.alike(head, run.first, keys.bounds()) >= bounds.size()) {
    if (sees(run.first)) append(out, 0, part);
    return;
  }
  if (part.size() > kFewRows) {
    const Index middle = (part.begin + part.end) / 2;
    add_seeing(mask, head, queries, {part.begin, middle}, keys, out, scratch);
    add_seeing(mask, head, queries, {middle, part.end}, keys, out, scratch);
    return;
  }
  for (Index i = part.begin; i < part.end; ++i) {
    const Index row = queries.at(i);
    if (keys.step > 1 ? sees(row)
                      : mask.cover(head, {row, row + 1}, keys.bounds()) != Cover::None) {
      append(out, 0, {i, i + 1});
    }
  }
}

/// The members of `queries` that see a key, counted from its first.
Ranges members_seeing(const Mask& mask, Index head, const Run& queries, const Runs& keys) {
  std::vector<Range> found;
  std::vector<Range> scratch;
  for (const Run& run : keys) {
    add_seeing(mask, head, queries, {0, queries.count}, run, found, scratch);
  }
  return union_of(std::move(found));
}

}  // namespace

Ranges queries_seeing(const Mask& mask, Index head, Range queries, const Runs& keys) {
  Ranges seeing = members_seeing(mask, head, {queries.begin, queries.size(), 1}, keys);
  for (Range& range : seeing) range = {queries.begin + range.begin, queries.begin + range.end};
  return seeing;
}

Index rows_seeing(const Mask& mask, Index head, const Runs& queries, const Runs& keys) {
  const std::vector<Band> bands = bands_of(keys);
  const Index step = mask.step(head);
  if (!dense(bands) && step == 1) return spans_for(mask, head, queries, bands).seeing(keys);
  Index rows = 0;
  each_residue(queries, keys, step, [&](const Runs& of_q, const Runs& of_k) {
    for (const Run& run : of_q) rows += size(members_seeing(mask, head, run, of_k));
  });
  return rows;
}

std::vector<std::pair<Index, Index>> variants(const Mask& mask, Range heads) {
  std::vector<std::pair<Index, Index>> out;
  std::vector<Index> seen;
  for (Index h = heads.begin; h < heads.end; ++h) {
    const auto at = std::find(seen.begin(), seen.end(), mask.variant(h));
    if (at == seen.end()) {
      seen.push_back(mask.variant(h));
      out.emplace_back(h, 1);
    } else {
      ++out[static_cast<std::size_t>(at - seen.begin())].second;
    }
  }
  return out;
}

}  // namespace dattn
