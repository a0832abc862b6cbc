#include "kernels/masks/s2.hpp"

#include <stdexcept>

#include "kernels/settings.hpp"

namespace dattn {
namespace {

constexpr std::string_view kForm =
    "s2:block=64,local=4,stride=8,offset=0,step=S,dense=0 or s2:relative=1,local=4x4,...";

struct Settled {
  Index block;
  Index left;    ///< blocks up to the query's own, it counted
  Index right;   ///< from it on; relative only
  Index stride;  ///< blocks
  Index offset;
  Index step;   ///< blocks from one key head's shard to the next one's
  Index dense;  ///< key heads, the last ones
  bool relative;
};

Index floored(Index a, Index b) { return a / b - (a % b < 0 ? 1 : 0); }

/// The shards of S2-Attention (Lin et al. 2024, arXiv 2407.17678). Block kb of the keys is seen
/// from block qb of the queries
/// - causal ("absolute"): if qb - kb < left, or (kb + key head * step + offset) mod stride is 0;
///   and key <= query;
/// - relative, both ways: if as many blocks lie between kb and the local ones as a multiple of
///   stride; the same for all key heads that are not dense.
/// Dense key heads see everything (causal: up to the query).
class S2 : public Mask {
 public:
  S2(const Settled& settled, const Shape& shape) : s(settled), shape_(shape) {}

  Index variant(Index head) const override {
    return is_dense(head) ? s.stride : s.relative ? 0 : residue(head);
  }
  Index heads() const override { return shape_.query_heads; }
  std::string spec() const override {
    return "s2:" + std::string(s.relative ? "relative=1," : "") +
           "block=" + std::to_string(s.block) + ",local=" + std::to_string(s.left) +
           (s.relative ? "x" + std::to_string(s.right) : "") +
           ",stride=" + std::to_string(s.stride) +
           (s.relative
                ? ""
                : ",offset=" + std::to_string(s.offset) + ",step=" + std::to_string(s.step)) +
           ",dense=" + std::to_string(s.dense);
  }

 protected:
  bool is_dense(Index head) const { return shape_.key_head(head) >= shape_.key_heads - s.dense; }
  Index block_of(Index position) const { return floored(position, s.block); }
  Range keys_of(Index block) const { return {block * s.block, (block + 1) * s.block}; }
  /// What a causal head's shard is, modulo stride.
  Index residue(Index head) const {
    const Index shift = (shape_.key_head(head) * s.step + s.offset) % s.stride;
    return shift == 0 ? 0 : s.stride - shift;
  }

  Settled s;
  Shape shape_;
};

class Absolute final : public S2 {
 public:
  using S2::S2;

  bool allows(Index head, Index query, Index key) const override {
    if (key > query) return false;
    const Index block = block_of(key);
    return block_of(query) - block < s.left || always(head, block);
  }
  void spans(Index head, Index query, Range keys, std::vector<Range>& out) const override {
    const Range before = intersect(keys, {0, query + 1});
    if (before.empty()) return;
    if (is_dense(head) || s.stride == 1) {
      out.push_back(before);
      return;
    }
    const Index first_local = block_of(query) - s.left + 1;
    const std::size_t first = out.size();
    const auto add = [&](Range seen) { append(out, first, intersect(seen, before)); };
    const Index begin = block_of(before.begin);
    const Index shard = residue(head);
    const Index end = std::min(first_local, block_of(before.end - 1) + 1);
    for (Index block = begin + (shard - begin % s.stride + s.stride) % s.stride; block < end;
         block += s.stride) {
      add(keys_of(block));
    }
    add({first_local * s.block, query + 1});
  }
  /// A key of the shard is seen by all queries from its own position on, others until the block
  /// `left` blocks behind theirs.
  Cover cover(Index head, Range queries, Range keys) const override {
    if (queries.empty() || keys.empty()) return Cover::None;
    const Index last = std::min(keys.end, queries.end) - 1;
    if (last < keys.begin) return Cover::None;
    const bool any = always(head, block_of(last)) || until(block_of(last)) > queries.begin ||
                     shard_before(head, block_of(last)) >= keys.begin;
    if (!any) return Cover::None;
    // The first key that some query no longer sees.
    Index first = block_of(keys.begin);
    if (always(head, first)) ++first;
    const bool others = !is_dense(head) && s.stride > 1 && first * s.block < keys.end;
    const bool all = keys.end - 1 <= queries.begin && (!others || queries.end <= until(first));
    return all ? Cover::All : Cover::Some;
  }
  /// Queries of one block, or for which none of the keys is local any more, behind all of them.
  Index alike(Index head, Index query, Range keys) const override {
    if (keys.empty()) return kAllAlike;
    if (query < keys.end - 1) return std::max<Index>(1, keys.begin - query);
    const bool shards_only = until(block_of(keys.end - 1)) <= query;
    if (is_dense(head) || s.stride == 1 || shards_only) return kAllAlike;
    return s.block - (query - block_of(query) * s.block);
  }

 private:
  bool always(Index head, Index block) const {
    return is_dense(head) || (block - residue(head)) % s.stride == 0;
  }
  /// The first query that no longer sees a block which is in no shard of its head.
  Index until(Index block) const { return (block + s.left) * s.block; }
  /// The last key of the head's shard before this block; negative if there is none.
  Index shard_before(Index head, Index block) const {
    const Index back = ((block - residue(head)) % s.stride + s.stride) % s.stride;
    return keys_of(block - back).end - 1;
  }
};

class Relative final : public S2 {
 public:
  using S2::S2;

  bool allows(Index head, Index query, Index key) const override {
    return is_dense(head) || at(block_of(key) - block_of(query));
  }
  void spans(Index head, Index query, Range keys, std::vector<Range>& out) const override {
    if (keys.empty()) return;
    if (is_dense(head) || s.stride == 1) {
      out.push_back(keys);
      return;
    }
    const std::size_t first = out.size();
    const Index own = block_of(query);
    const Index last = block_of(keys.end - 1);
    for (Index block = block_of(keys.begin); block <= last;) {
      const Index apart = block - own;
      const bool seen = at(apart);
      if (seen) append(out, first, intersect(keys, keys_of(block)));
      const bool next_is_local = apart > -s.left && apart < s.right - 1;
      block += seen && !next_is_local ? s.stride : 1;
    }
  }
  Cover cover(Index head, Range queries, Range keys) const override {
    if (queries.empty() || keys.empty()) return Cover::None;
    if (is_dense(head) || s.stride == 1) return Cover::All;
    bool any = false;
    bool gap = false;
    const Index end = block_of(keys.end - 1) - block_of(queries.begin);
    for (Index apart = block_of(keys.begin) - block_of(queries.end - 1); apart <= end; ++apart) {
      (at(apart) ? any : gap) = true;
      if (any && gap) return Cover::Some;
    }
    return any ? Cover::All : Cover::None;
  }
  Index alike(Index head, Index query, Range) const override {
    if (is_dense(head) || s.stride == 1) return kAllAlike;
    return s.block - (query - block_of(query) * s.block);
  }

 private:
  /// Whether a query sees the block that lies this many blocks behind its own.
  bool at(Index apart) const {
    const Index left = std::max<Index>(0, -apart - s.left + 1);
    const Index right = std::max<Index>(0, apart - s.right + 1);
    return (left + right) % s.stride == 0;
  }
};

MaskPtr make(std::string_view arguments, const Shape& shape, const OpenNumbers&) {
  Settings settings(arguments, kForm);
  Settled s{};
  const Index relative = settings.count("relative", 0);
  s.relative = relative == 1;
  s.block = settings.count("block", 64, 1);
  s.stride = settings.count("stride", 8, 1);
  s.dense = settings.count("dense", 0);
  const std::vector<Index> local = settings.counts("local", 1);
  s.left = local.empty() ? 4 : local[0];
  s.right = local.size() == 2 ? local[1] : s.left;
  if (!s.relative) {
    s.offset = settings.count("offset", 0);
    s.step = settings.count("step", std::max<Index>(1, s.stride / shape.query_heads));
  }
  settings.done();
  if (relative > 1) {
    throw std::invalid_argument("relative is 0 or 1; the mask is written " + std::string(kForm));
  }
  if (local.size() > (s.relative ? 2U : 1U)) {
    throw std::invalid_argument(
        "local takes one count, or with relative=1 two, as 4x4; the mask "
        "is written " +
        std::string(kForm));
  }
  if (s.dense > shape.key_heads) {
    throw std::invalid_argument("dense=" + std::to_string(s.dense) + " of " +
                                std::to_string(shape.key_heads) +
                                " key heads; the mask is written " + std::string(kForm));
  }
  const Index all = (shape.keys + shape.queries) / s.block + 2;  // more blocks change nothing
  s.left = std::min(s.left, all);
  s.right = std::min(s.right, all);
  if (s.relative) return std::make_shared<Relative>(s, shape);
  return std::make_shared<Absolute>(s, shape);
}

}  // namespace

MaskKind s2_kind() {
  return {
      "s2", kForm,
      "the last `local` blocks, and of each `stride` blocks one, another one for each key head",
      "settings, each optional: keys of a block, the others in blocks; S is stride / heads, 1 at "
      "least",
      make};
}

}  // namespace dattn
