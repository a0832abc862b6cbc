#include "parallel/kernel_work.hpp"

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>
#include <vector>

#include "kernels/step.hpp"

namespace dattn {
namespace {

/// Where rows begin (+1) and cease (-1) to see keys, by key row.
using Edges = std::vector<std::pair<Index, Index>>;

/// Adds what the row at `query` sees of `keys`; pairs.
Index add_seen(const Mask& mask, Index head, Index query, const Runs& keys, Edges& edges,
               std::vector<Range>& scratch) {
  Index pairs = 0;
  Index before = 0;  // rows of keys
  for (const Run& run : keys) {
    scratch.clear();
    Index first = 0;  // what spans are counted from
    if (run.step == 1) {
      mask.spans(head, query, run.bounds(), scratch);
      first = run.first;
    } else {
      mask.members(head, query, run, scratch);
    }
    for (const Range span : scratch) {
      edges.emplace_back(before + span.begin - first, 1);
      edges.emplace_back(before + span.end - first, -1);
      pairs += span.size();
    }
    before += run.count;
  }
  return pairs;
}

/// Keys, of `keys`, in pieces that some of `rows` rows see, and in those that not all of them see
/// whole.
std::pair<Index, Index> pieces(Edges& edges, Index rows, Index granule, Index keys) {
  std::sort(edges.begin(), edges.end());
  Index touched = 0;
  Index whole = 0;
  Index next = 0;  // the first piece that is not counted
  Index seeing = 0;
  bool ends_whole = false;  // all rows see the last piece whole
  Index whole_from = -1;    // where all rows began to see keys, and still do
  for (std::size_t i = 0; i < edges.size();) {
    const Index from = edges[i].first;
    for (; i < edges.size() && edges[i].first == from; ++i) seeing += edges[i].second;
    if (seeing == rows) {
      if (whole_from < 0) whole_from = from;
    } else if (whole_from >= 0) {
      const Index end = (from == keys ? from + granule - 1 : from) / granule;
      whole += std::max<Index>(0, end - (whole_from + granule - 1) / granule);
      ends_whole = from == keys && end > (whole_from + granule - 1) / granule;
      whole_from = -1;
    }
    if (seeing == 0 || i == edges.size()) continue;
    const Index first = std::max(next, from / granule);
    const Index end = (edges[i].first + granule - 1) / granule;
    touched += std::max<Index>(0, end - first);
    next = std::max(next, end);
  }
  const Index beyond = std::max<Index>(0, next * granule - keys);  // of the last piece
  return {touched * granule - beyond, (touched - whole) * granule - (ends_whole ? 0 : beyond)};
}

}  // namespace

Extra extra_pairs(const Mask& mask, Index head, const Runs& queries, const Runs& keys,
                  const Grain& grain, Index heads, Index samples) {
  const Index step = mask.step(head);
  const Index together = std::max<Index>(1, grain.lanes / std::max<Index>(1, heads));
  const Index groups = (size(queries) + together - 1) / together;
  if (grain.lanes == 0 || groups == 0) return {};
  if (const auto masks = mask.apart(head);
      !masks.empty() && by_residues(queries, keys, masks.back()->step(head))) {
    Extra sum;
    for (const MaskPtr& one : masks) {
      const Extra part = extra_pairs(*one, head, queries, keys, grain, heads, samples);
      sum = {sum.beside + part.beside, sum.masked + part.masked};
    }
    return sum;
  }
  const Index count = std::min(groups, samples);
  const auto residues =
      by_residues(queries, keys, step) ? by_residue(queries, step) : std::map<Index, Runs>{};
  Edges edges;
  std::vector<Range> scratch;
  Extra sum;
  for (Index i = 0; i < count; ++i) {
    // Residues one after the other, each with its share of the groups.
    Runs rows = queries;
    Runs seen = keys;
    Index group = i * groups / count;
    if (const auto some = std::ssize(residues); some > 0) {
      const auto& [residue, of_q] = *std::next(residues.begin(), group % some);
      rows = of_q;
      seen = of_residue(keys, step, residue);
      group = group / some % ((size(rows) + together - 1) / together);
    }
    const Range part_rows{group * together, std::min((group + 1) * together, size(rows))};
    edges.clear();
    Index pairs = 0;
    for (const Run& run : part(rows, part_rows)) {
      for (Index at = 0; at < run.count; ++at) {
        pairs += add_seen(mask, head, run.at(at), seen, edges, scratch);
      }
    }
    const auto [touched, masked] = pieces(edges, part_rows.size(), grain.granule, size(seen));
    sum.beside += static_cast<double>(part_rows.size() * touched - pairs);
    sum.masked += static_cast<double>(part_rows.size() * masked);
  }
  const double times = static_cast<double>(groups) / static_cast<double>(count);
  return {std::max(0.0, sum.beside) * times, sum.masked * times};
}

}  // namespace dattn
