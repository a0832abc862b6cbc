#include "parallel/coverage.hpp"

#include <algorithm>

#include "kernels/area.hpp"

namespace dattn {
namespace {

/// The ranges between neighbouring edges of [first, last).
class Edges {
 public:
  explicit Edges(Range whole) : points_{whole.begin, whole.end} {}
  void add(Range r) {
    for (const Index p : {r.begin, r.end}) {
      if (p > points_[0] && p < points_[1]) points_.push_back(p);
    }
  }
  std::vector<Range> between() {
    std::sort(points_.begin(), points_.end());
    points_.erase(std::unique(points_.begin(), points_.end()), points_.end());
    std::vector<Range> out;
    for (std::size_t i = 1; i < points_.size(); ++i) out.push_back({points_[i - 1], points_[i]});
    return out;
  }

 private:
  std::vector<Index> points_;
};

std::string row_text(Range heads, Index row) {
  return "(h" + std::to_string(heads.begin) + ", row " + std::to_string(row) + ")";
}

/// Leaves of `cells` what lies outside `rect`.
void take_out(std::vector<Cell>& cells, const Rect& rect) {
  std::vector<Cell> left;
  for (const Cell& c : cells) {
    const Range heads = intersect(c.heads, rect.heads);
    const Range rows = intersect(c.rows, rect.rows);
    if (heads.empty() || rows.empty()) {
      left.push_back(c);
      continue;
    }
    for (const Rect& part :
         {Rect{{c.heads.begin, heads.begin}, c.rows}, Rect{{heads.end, c.heads.end}, c.rows},
          Rect{heads, {c.rows.begin, rows.begin}}, Rect{heads, {rows.end, c.rows.end}}}) {
      if (!part.heads.empty() && !part.rows.empty()) {
        left.push_back({part.heads, part.rows, c.contribution});
      }
    }
  }
  cells = std::move(left);
}

/// The rectangles of a Block, which may be thousands.
class Pieces {
 public:
  explicit Pieces(const Block& block)
      : block_(block), ascending_(std::is_sorted(block.rows.begin(), block.rows.end())) {}

  /// Visits those that share something with `cell`.
  template <class Visit>
  void visit(const Cell& cell, const Visit& visit) const {
    for (const Range heads : block_.heads) {
      if (intersect(heads, cell.heads).empty()) continue;
      auto rows = block_.rows.begin();
      if (ascending_) {
        rows = std::partition_point(rows, block_.rows.end(),
                                    [&](Range r) { return r.end <= cell.rows.begin; });
      }
      for (; rows != block_.rows.end(); ++rows) {
        if (!intersect(*rows, cell.rows).empty()) {
          visit(Rect{heads, *rows});
        } else if (ascending_) {
          break;
        }
      }
    }
  }

 private:
  const Block& block_;
  bool ascending_;
};

/// Partners (keys of query rows, queries of key rows) that one contribution brings to the rows in
/// question.
struct Reach {
  Range partners;
  int contribution;
};

/// Checks the rows `rows` of a result, over all of which the same contributions lie, for the query
/// heads `heads`.
class RowCheck {
  /// From here on partners are not looked at run by run, but those are taken that there are.
  static constexpr std::size_t kManyRuns = 4;

 public:
  RowCheck(const Problem& problem, const Program& program,
           const std::vector<Contribution>& contributions, Kind kind, Range heads, Range rows)
      : problem_(problem),
        program_(program),
        contributions_(contributions),
        kind_(kind),
        heads_(variants(problem.mask(), heads)),
        partners_(of_queries(kind) ? problem.keys() : problem.queries()),
        row_numbers_(rows),
        rows_((of_queries(kind) ? problem.queries() : problem.keys()).positions({rows})) {}

  std::optional<Fault> run(std::vector<Reach> reach) const {
    std::sort(reach.begin(), reach.end(),
              [](const Reach& a, const Reach& b) { return a.partners < b.partners; });
    Index covered = 0;
    Ranges left;  // of the partners: nothing brings these
    const Reach* furthest = nullptr;
    for (const Reach& next : reach) {
      append(left, {covered, next.partners.begin});
      if (furthest != nullptr) {
        if (auto fault = twice({intersect(next.partners, {next.partners.begin, covered})},
                               *furthest, next)) {
          return fault;
        }
      }
      if (furthest == nullptr || next.partners.end > covered) {
        covered = std::max(covered, next.partners.end);
        furthest = &next;
      }
    }
    append(left, {covered, partners_.tokens()});
    return missing(left);
  }

 private:
  /// Some allowed pair on these rows of partners, as "pair (h0, q32, k0)".
  std::optional<std::string> pair_on(const Ranges& partner_rows) const {
    if (size(partner_rows) == 0) return std::nullopt;
    const Runs all = partners_.positions(partner_rows);
    for (const auto& [head, count] : heads_) {
      const Runs partners =
          all.size() > kManyRuns
              ? partners_.positions(intersect(
                    partner_rows, *problem_.partners(of_queries(kind_), head, row_numbers_)))
              : all;
      const auto pair = of_queries(kind_) ? allowed_pair(problem_.mask(), head, rows_, partners)
                                          : allowed_pair(problem_.mask(), head, partners, rows_);
      if (pair) {
        return "pair (h" + std::to_string(head) + ", q" +
               std::to_string(pair->query - problem_.shape().first_query()) + ", k" +
               std::to_string(pair->key) + ")";
      }
    }
    return std::nullopt;
  }

  /// What the rank delivers, in words.
  std::string delivered() const {
    return kind_ == Kind::O ? "" : std::string(name_of(kind_)) + " of ";
  }

  std::optional<Fault> missing(const Ranges& partner_rows) const {
    const auto pair = pair_on(partner_rows);
    if (!pair) return std::nullopt;
    return Fault{program_.rank, static_cast<int>(program_.steps.size()),
                 *pair + " is computed 0 times in " + delivered() + "what the rank delivers"};
  }

  std::optional<Fault> twice(const Ranges& partner_rows, const Reach& first,
                             const Reach& second) const {
    const auto pair = pair_on(partner_rows);
    if (!pair) return std::nullopt;
    const Contribution& a = contributions_[static_cast<std::size_t>(first.contribution)];
    const Contribution& b = contributions_[static_cast<std::size_t>(second.contribution)];
    return Fault{b.rank, b.step,
                 *pair + " is computed again; rank " + std::to_string(a.rank) + ", step " +
                     std::to_string(a.step) + " has it too, and rank " +
                     std::to_string(program_.rank) + " delivers both" +
                     (kind_ == Kind::O ? "" : " in " + std::string(name_of(kind_)))};
  }

  const Problem& problem_;
  const Program& program_;
  const std::vector<Contribution>& contributions_;
  Kind kind_;
  std::vector<std::pair<Index, Index>> heads_;
  const Partition& partners_;
  Range row_numbers_;
  Runs rows_;  ///< where they lie
};

/// Checks one result of one rank.
std::optional<Fault> check_result(const Problem& problem, const Program& program,
                                  const Result& result, const std::vector<Cell>& cells,
                                  std::vector<Contribution>& contributions) {
  const Kind kind = result.block.kind;
  // Key and value heads are looked at query head by query head: several ranks may have computed
  // some each.
  std::vector<Rect> wholes;
  for (const Range heads : query_heads_of(kind, result.block.heads, problem.shape())) {
    for (const Range rows : result.block.rows) wholes.push_back({heads, rows});
  }
  for (const Rect& whole : wholes) {
    Edges heads(whole.heads);
    Edges rows(whole.rows);
    std::vector<Cell> here;
    for (const Cell& cell : cells) {
      Contribution& contribution = contributions[static_cast<std::size_t>(cell.contribution)];
      const Range row_part = intersect(cell.rows, whole.rows);
      if (row_part.empty()) continue;
      const Range of_cell =
          intersect(query_heads_of(kind, cell.heads, problem.shape()), whole.heads);
      for (const Range contributed : contribution.heads) {
        const Range head_part = intersect(of_cell, contributed);
        if (head_part.empty()) continue;
        here.push_back({head_part, row_part, cell.contribution});
        heads.add(head_part);
        rows.add(row_part);
        contribution.used = true;
      }
    }
    const auto row_parts = rows.between();
    for (const Range head_part : heads.between()) {
      std::vector<std::vector<Reach>> reach(row_parts.size());
      for (const Cell& cell : here) {
        if (!cell.heads.contains(head_part)) continue;
        const Contribution& c = contributions[static_cast<std::size_t>(cell.contribution)];
        const Range whole_rows = cell.rows;
        auto part = std::partition_point(row_parts.begin(), row_parts.end(), [&](const Range& r) {
          return r.begin < whole_rows.begin;
        });
        for (; part != row_parts.end() && part->end <= whole_rows.end; ++part) {
          for (const Range partners : *(of_queries(kind) ? c.key_rows : c.query_rows)) {
            reach[static_cast<std::size_t>(part - row_parts.begin())].push_back(
                {partners, cell.contribution});
          }
        }
      }
      for (std::size_t i = 0; i < row_parts.size(); ++i) {
        const RowCheck check(problem, program, contributions, kind, head_part, row_parts[i]);
        if (auto fault = check.run(std::move(reach[i]))) return fault;
      }
    }
  }
  return std::nullopt;
}

}  // namespace

void append_rects(std::vector<Rect>& rects, const Block& block) {
  for (const Range heads : block.heads) {
    for (const Range rows : block.rows) rects.push_back({heads, rows});
  }
}

// `source` is a copy: a rank may send to itself.
void move_cells(std::vector<Cell> source, const Block& block, std::vector<Cell>& target) {
  const Pieces pieces(block);
  std::vector<Cell> left;
  for (const Cell& cell : target) {
    std::vector<Cell> parts{cell};
    pieces.visit(cell, [&](const Rect& r) { take_out(parts, r); });
    left.insert(left.end(), parts.begin(), parts.end());
  }
  target = std::move(left);
  for (const Cell& cell : source) {
    pieces.visit(cell, [&](const Rect& r) {
      target.push_back(
          {intersect(cell.heads, r.heads), intersect(cell.rows, r.rows), cell.contribution});
    });
  }
}

std::optional<std::string> misfit(std::vector<Rect> rects, const Block& target, bool whole) {
  if (target.empty()) return std::nullopt;
  std::vector<Range> head_parts;
  for (const Range whole_heads : target.heads) {
    Edges edges(whole_heads);
    for (const Rect& r : rects) edges.add(r.heads);
    for (const Range part : edges.between()) head_parts.push_back(part);
  }
  std::sort(rects.begin(), rects.end(),
            [](const Rect& a, const Rect& b) { return a.rows < b.rows; });
  Ranges wanted = target.rows;
  std::sort(wanted.begin(), wanted.end());
  for (const Range heads : head_parts) {
    auto want = wanted.begin();
    Index at = want->begin;
    for (const Rect& r : rects) {
      if (!r.heads.contains(heads) || r.rows.empty()) continue;
      if (r.rows.begin < at) return row_text(heads, r.rows.begin) + " is there twice";
      // Skip to the wanted range that this one starts in; what is passed over stays open.
      while (want != wanted.end() && r.rows.begin >= want->end) {
        if (whole && at < want->end) return row_text(heads, at) + " is not there";
        if (++want == wanted.end()) return row_text(heads, r.rows.begin) + " does not belong";
        at = want->begin;
      }
      if (whole && r.rows.begin > at) return row_text(heads, at) + " is not there";
      at = r.rows.end;
      while (want != wanted.end() && at > want->end) {  // neighbouring ranges may come as one
        const Index end = want->end;
        if (++want == wanted.end() || want->begin != end) {
          return row_text(heads, end) + " does not belong";
        }
      }
    }
    while (whole && want != wanted.end()) {
      if (at < want->end) return row_text(heads, at) + " is not there";
      if (++want != wanted.end()) at = std::max(at, want->begin);
    }
  }
  return std::nullopt;
}

std::optional<Fault> check_results(
    const Problem& problem, const Plan& plan,
    const std::function<const std::vector<Cell>&(int rank, SlotId)>& cells,
    std::vector<Contribution>& contributions) {
  const Pass pass = plan.front().pass;
  const auto at_end = [](const Program& program, std::string what) {
    return Fault{program.rank, static_cast<int>(program.steps.size()), std::move(what)};
  };
  for (const Program& program : plan) {
    if (program.pass == pass) continue;
    return at_end(program, "does not go " + std::string(name_of(pass)) + " as rank 0 does");
  }
  for (std::size_t i = 0; i < result_kinds(pass).size(); ++i) {
    const Kind kind = result_kinds(pass)[i];
    std::vector<Rect> delivered;
    for (const Program& program : plan) append_rects(delivered, program.results[i].block);
    Ranges rows;
    append(rows, {0, (of_queries(kind) ? problem.queries() : problem.keys()).tokens()});
    const Block whole{kind, {0, heads_of(kind, problem.shape())}, rows};
    if (auto why = misfit(delivered, whole, true)) {
      const std::string what = kind == Kind::O ? "" : std::string(name_of(kind)) + ", ";
      return at_end(plan.front(), "of " + what + "what all ranks deliver together " + *why);
    }
    for (const Program& program : plan) {
      const Result& result = program.results[i];
      if (auto fault = check_result(problem, program, result, cells(program.rank, result.slot),
                                    contributions)) {
        return fault;
      }
    }
  }
  return std::nullopt;
}

}  // namespace dattn
