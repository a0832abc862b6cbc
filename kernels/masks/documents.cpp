#include "kernels/masks/documents.hpp"

#include <algorithm>
#include <stdexcept>

#include "kernels/settings.hpp"

namespace dattn {
namespace {

constexpr std::string_view kForm = "documents:n1,n2,... or documents:offsets=FILE";
constexpr std::string_view kWritten =
    "documents:n1,n2,... or documents:offsets=FILE (names with +/;@(), in double quotes)";

class Documents final : public Mask {
 public:
  explicit Documents(const std::vector<Index>& lengths) {
    edges_.push_back(0);
    for (const Index n : lengths) {
      if (n > 0) edges_.push_back(edges_.back() + n);
    }
  }

  bool allows(Index, Index query, Index key) const override { return around(query).contains(key); }
  void spans(Index, Index query, Range keys, std::vector<Range>& out) const override {
    const Range seen = intersect(around(query), keys);
    if (!seen.empty()) out.push_back(seen);
  }
  Cover cover(Index, Range queries, Range keys) const override {
    const Range inside = intersect(queries, {0, edges_.back()});
    if (inside.empty() || keys.empty()) return Cover::None;
    const Range first = around(inside.begin);
    const Range last = around(inside.end - 1);
    // The documents of a run of queries are one run of keys.
    if (intersect({first.begin, last.end}, keys).empty()) return Cover::None;
    const bool all = inside == queries && first == last && first.contains(keys);
    return all ? Cover::All : Cover::Some;
  }
  Index alike(Index, Index query, Range keys) const override {
    const Range seen = intersect(keys, {0, edges_.back()});
    if (seen.empty()) return kAllAlike;
    const Index first = around(seen.begin).begin;  // the first query that sees any
    if (query < first) return first - query;
    const Range own = around(query);
    return own.begin >= seen.end || own.empty() ? kAllAlike : own.end - query;
  }
  std::string spec() const override {
    std::string out = "documents:";
    for (std::size_t i = 1; i < edges_.size(); ++i) {
      out += (i == 1 ? "" : ",") + std::to_string(edges_[i] - edges_[i - 1]);
    }
    return out;
  }

 private:
  /// The document that holds this position; empty outside all of them.
  Range around(Index position) const {
    if (position < 0 || position >= edges_.back()) return {0, 0};
    const auto next = std::upper_bound(edges_.begin(), edges_.end(), position);
    return {*(next - 1), *next};
  }

  std::vector<Index> edges_;  ///< 0, n1, n1+n2, ...: ascending, no empty document
};

MaskPtr of_lengths(std::string_view arguments, const Shape& shape) {
  const std::vector<Index> lengths = parse_counts(arguments, "documents:n1,n2,...");
  Index sum = 0;
  for (const Index n : lengths) {
    sum = n > shape.keys - sum ? shape.keys + 1 : sum + n;
    if (sum > shape.keys) break;
  }
  if (sum != shape.keys) {
    throw std::invalid_argument("the document lengths add up to " +
                                (sum > shape.keys ? "more than " : std::to_string(sum) + ", not ") +
                                std::to_string(shape.keys) + " keys");
  }
  return std::make_shared<Documents>(lengths);
}

/// Of a file of offsets, as variable-length attention takes them (cu_seqlens).
MaskPtr of_offsets(std::string_view arguments, const Shape& shape, const OpenNumbers& open) {
  Settings settings(arguments, kWritten);
  const std::string name = settings.file("offsets");
  settings.done();
  if (!open) {
    throw std::invalid_argument("nobody here opens files: give parse_mask a function that does");
  }
  const auto fail = [&](const std::string& why) {
    throw BadMaskNumbers("offsets=" + quoted_file(name) + " " + why +
                         "; give [documents + 1] numbers: 0, n1, n1 + n2 and so on, up to " +
                         std::to_string(shape.keys) + ", the number of keys");
  };
  const NumberFile file = open(name);
  if (file.extents.size() != 1 || file.extents[0] < 1) fail("holds no list of offsets");
  const std::vector<Index> offsets = file.read();
  if (offsets.front() != 0) fail("begins with " + std::to_string(offsets.front()));
  std::vector<Index> lengths;
  for (std::size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] < offsets[i - 1]) {
      fail("has " + std::to_string(offsets[i]) + " behind " + std::to_string(offsets[i - 1]));
    }
    lengths.push_back(offsets[i] - offsets[i - 1]);
  }
  if (offsets.back() != shape.keys) fail("ends with " + std::to_string(offsets.back()));
  return std::make_shared<Documents>(lengths);
}

}  // namespace

MaskKind documents_kind() {
  return {
      "documents", kForm, "a query sees the keys of its own document",
      "lengths that add up to the keys, or a NumPy file of where documents begin, as cu_seqlens",
      [](std::string_view arguments, const Shape& shape, const OpenNumbers& open) -> MaskPtr {
        return arguments.find('=') == std::string_view::npos ? of_lengths(arguments, shape)
                                                             : of_offsets(arguments, shape, open);
      }};
}

}  // namespace dattn
