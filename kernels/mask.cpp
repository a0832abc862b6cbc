#include "kernels/mask.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>

#include "kernels/check.hpp"
#include "kernels/count.hpp"
#include "kernels/masks/batch.hpp"
#include "kernels/masks/blocks.hpp"
#include "kernels/masks/causal.hpp"
#include "kernels/masks/dilated.hpp"
#include "kernels/masks/documents.hpp"
#include "kernels/masks/full.hpp"
#include "kernels/masks/neighbor.hpp"
#include "kernels/masks/prefix.hpp"
#include "kernels/masks/s2.hpp"
#include "kernels/masks/sink.hpp"
#include "kernels/masks/span.hpp"
#include "kernels/masks/stream.hpp"
#include "kernels/masks/window.hpp"

namespace dattn {

void Mask::spans(Index head, Index query, Range keys, std::vector<Range>& out) const {
  Index k = keys.begin;
  while (k < keys.end) {
    while (k < keys.end && !allows(head, query, k)) ++k;
    const Index begin = k;
    while (k < keys.end && allows(head, query, k)) ++k;
    if (k > begin) out.push_back({begin, k});
  }
}

void Mask::members(Index head, Index query, const Run& keys, std::vector<Range>& out) const {
  const std::size_t first = out.size();
  spans(head, query, keys.bounds(), out);
  std::size_t end = first;  // of what is done; never ahead of what is read
  for (std::size_t i = first; i < out.size(); ++i) {
    const Range next = keys.inside(out[i]);
    if (next.empty()) continue;
    if (end > first && out[end - 1].end == next.begin) {
      out[end - 1].end = next.end;
    } else {
      out[end++] = next;
    }
  }
  out.resize(end);
}

Cover Mask::cover(Index head, Range queries, Range keys) const {
  if (queries.empty() || keys.empty()) return Cover::None;
  bool any = false;
  bool gap = false;
  std::vector<Range> row;
  const auto is_cut = [&](Index q) {
    row.clear();
    spans(head, q, keys, row);
    any = any || !row.empty();
    gap = gap || row.empty() || row.front() != keys;
    return any && gap;
  };
  // The last row first: it sees something in most tiles that the first rows see nothing of.
  if (is_cut(queries.end - 1)) return Cover::Some;
  for (Index q = queries.begin; q < queries.end - 1;) {
    if (is_cut(q)) return Cover::Some;
    q += std::min(alike(head, q, keys), queries.end - q);
  }
  return any ? Cover::All : Cover::None;
}

std::optional<Index> Mask::pairs(Index, Range, Range) const { return {}; }

Index Mask::alike(Index, Index, Range) const { return 1; }

Index Mask::step(Index) const { return 1; }

std::vector<MaskPtr> Mask::apart(Index) const { return {}; }

Index Mask::variant(Index) const { return 0; }

Index Mask::heads() const { return 1; }

std::span<const MaskKind> mask_kinds() {
  static const std::array kinds{full_kind(),   causal_kind(),  window_kind(),   documents_kind(),
                                prefix_kind(), sink_kind(),    stream_kind(),   span_kind(),
                                s2_kind(),     dilated_kind(), neighbor_kind(), blocks_kind(),
                                batch_kind()};
  return kinds;
}

std::optional<Lengths> implied_lengths(std::string_view spec) {
  if (spec.find_first_of("+/;@()") != std::string_view::npos) return std::nullopt;
  const std::size_t colon = std::min(spec.find(':'), spec.size());
  for (const MaskKind& kind : mask_kinds()) {
    if (kind.name != spec.substr(0, colon) || kind.lengths == nullptr) continue;
    return kind.lengths(spec.substr(std::min(colon + 1, spec.size())));
  }
  return std::nullopt;
}

std::vector<Index> parse_counts(std::string_view text, std::string_view form) {
  std::vector<Index> counts;
  while (true) {
    const std::size_t comma = text.find(',');
    const std::string_view word = text.substr(0, comma);
    const std::optional<Index> value = count_in(word);
    if (!value) {
      throw std::invalid_argument(shown(word) + " is not a count; the mask is written " +
                                  std::string(form));
    }
    counts.push_back(*value);
    if (comma == std::string_view::npos) return counts;
    text.remove_prefix(comma + 1);
  }
}

}  // namespace dattn
