#include "parallel/ragged_cache.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

#include "kernels/check.hpp"
#include "parallel/cache.hpp"
#include "parallel/decoder.hpp"
#include "parallel/homes.hpp"

namespace dattn {
namespace {

/// Filled caches under the masks of their sequences; or with `all`, where these only tell heads
/// apart, and a token sees all that is before it.
class SeenOfBatch final : public Mask {
 public:
  SeenOfBatch(const Decoding& decoding, std::span<const Index> lengths, bool all)
      : all_(all),
        new_(decoding.queries),
        first_query_(decoding.keys() - new_ * static_cast<Index>(lengths.size())),
        masks_(decoding.masks),
        lengths_(lengths.begin(), lengths.end()) {
    for (std::size_t s = 0; s < lengths.size(); ++s) firsts_.push_back(decoding.first(s));
    for (const MaskPtr& mask : masks_) heads_ = std::max(heads_, mask->heads());
    // Heads are alike where they are in every sequence.
    std::vector<MaskPtr> distinct = masks_;
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    std::map<std::vector<Index>, Index> known;
    for (Index h = 0; h < decoding.query_heads; ++h) {
      std::vector<Index> of_all;
      for (const MaskPtr& mask : distinct) of_all.push_back(mask->variant(h));
      variants_.push_back(known.try_emplace(of_all, h).first->second);
    }
  }

  bool allows(Index head, Index query, Index key) const override {
    const At at = this->at(query);
    if (all_ || !at.seen.contains(key)) return at.seen.contains(key);
    return masks_[at.sequence]->allows(head, at.token, key - at.seen.begin);
  }
  void spans(Index head, Index query, Range keys, std::vector<Range>& out) const override {
    const At at = this->at(query);
    const Index first = at.seen.begin;
    const Range part = intersect(at.seen, keys);
    const std::size_t before = out.size();
    if (part.empty()) return;
    if (all_) return append(out, before, part);
    masks_[at.sequence]->spans(head, at.token, {part.begin - first, part.end - first}, out);
    for (std::size_t i = before; i < out.size(); ++i) {
      out[i] = {out[i].begin + first, out[i].end + first};
    }
  }
  Index variant(Index head) const override { return variants_[static_cast<std::size_t>(head)]; }
  Index heads() const override { return heads_; }
  std::string spec() const override { return "batch under " + masks_.front()->spec(); }

 private:
  struct At {
    std::size_t sequence;
    Index token;
    Range seen;  ///< of the sequence's tokens, up to itself
  };
  At at(Index query) const {
    const Index row = query - first_query_;
    const auto s = static_cast<std::size_t>(row / new_);
    const Index token = lengths_[s] - new_ + row % new_;
    return {s, token, {firsts_[s], firsts_[s] + token + 1}};
  }

  bool all_;
  Index new_;
  Index first_query_;
  std::vector<MaskPtr> masks_;
  std::vector<Index> lengths_, firsts_, variants_;
  Index heads_ = 1;
};

/// The mask of one sequence, tokens up to the query's own. Unlike in the batch, where sequences lie
/// behind each other, query t is token t here: a step of the mask (Mask::step) stays one.
class UpToItself final : public Mask {
 public:
  explicit UpToItself(MaskPtr mask) : mask_(std::move(mask)) {}

  bool allows(Index head, Index query, Index key) const override {
    return key <= query && mask_->allows(head, query, key);
  }
  void spans(Index head, Index query, Range keys, std::vector<Range>& out) const override {
    const Range part = intersect(keys, {0, query + 1});
    if (!part.empty()) mask_->spans(head, query, part, out);
  }
  void members(Index head, Index query, const Run& keys, std::vector<Range>& out) const override {
    const Range part = keys.inside({0, query + 1});
    if (!part.empty()) mask_->members(head, query, keys.part(part), out);  // from the first on
  }
  Index step(Index head) const override { return mask_->step(head); }
  std::vector<MaskPtr> apart(Index head) const override {
    std::vector<MaskPtr> parts = mask_->apart(head);
    for (MaskPtr& part : parts) part = std::make_shared<const UpToItself>(part);
    return parts;
  }
  Index variant(Index head) const override { return mask_->variant(head); }
  Index heads() const override { return mask_->heads(); }
  std::string spec() const override { return "causal+(" + mask_->spec() + ")"; }

 private:
  MaskPtr mask_;
};

bool holds(const Ranges& ranges, Index i) {
  const auto behind = std::upper_bound(ranges.begin(), ranges.end(), i,
                                       [](Index at, const Range& r) { return at < r.end; });
  return behind != ranges.end() && behind->contains(i);
}

const Block& input_block(const Program& program, Kind kind) {
  return program.slots[static_cast<std::size_t>(program.input(kind))].block;
}

std::vector<bool> own_positions(const Problem& problem, const Program& program) {
  std::vector<bool> own(static_cast<std::size_t>(problem.shape().keys), false);
  for (const Run& run : problem.keys().positions(input_block(program, Kind::K).rows)) {
    for (Index n = 0; n < run.count; ++n) own[static_cast<std::size_t>(run.at(n))] = true;
  }
  return own;
}

/// Runs of neighbouring query heads of a rank that see the same.
std::vector<Range> heads_alike(const Problem& problem, const Program& program) {
  const Shape& shape = problem.shape();
  const Ranges mine =
      intersect(query_heads_of(Kind::K, input_block(program, Kind::K).heads, shape),
                query_heads_of(Kind::V, input_block(program, Kind::V).heads, shape));
  const auto columns = static_cast<int>(problem.mesh().axes.back().size);
  const Ranges& placed = problem.placement(columns).heads[static_cast<std::size_t>(
      problem.mesh().coordinate(program.rank, static_cast<int>(problem.mesh().axes.size()) - 1))];
  std::vector<Range> all;
  for (const Range group : problem.head_groups()) {
    for (const Range part : intersect(intersect(mine, placed), Ranges{group})) all.push_back(part);
  }
  return all;
}

Index row_bytes(const Problem& problem, Kind kind, Range heads) {
  return heads.size() * record_bytes(kind, problem.shape(), problem.type());
}

}  // namespace

MaskPtr seen_of_batch(const Decoding& decoding, std::span<const Index> lengths) {
  CHECK(decoding.masks.size() == lengths.size(), decoding.masks.size(), lengths.size());
  return std::make_shared<const SeenOfBatch>(decoding, lengths, false);
}

MaskPtr may_be_seen(const Decoding& decoding) {
  return std::make_shared<const SeenOfBatch>(decoding, decoding.capacity, true);
}

RaggedCache::RaggedCache(const Decoding& decoding, const Problem& problem, const Program& program)
    : decoding_(decoding), problem_(problem), own_(own_positions(problem, program)) {
  const std::vector<Range> heads = heads_alike(problem, program);
  each_ = heads.size();
  for (std::size_t s = 0; s < decoding.capacity.size(); ++s) {
    firsts_.push_back(decoding.first(s));
    const auto from = own_.begin() + firsts_.back();
    const Index tokens = std::count(from, from + decoding.capacity[s], true);
    for (const Range some : heads) {
      const Range key_heads = problem.shape().key_heads_of(some);
      const Range value_heads = problem.shape().value_heads_of(some);
      Part& part = parts_.emplace_back(Part{s, some, key_heads, value_heads,
                                            row_bytes(problem, Kind::K, key_heads),
                                            row_bytes(problem, Kind::V, value_heads)});
      part.k = Reserved(tokens * part.k_row);
      part.v = Reserved(tokens * part.v_row);
    }
  }
}

std::span<RaggedCache::Part> RaggedCache::parts(std::size_t sequence) {
  return std::span(parts_).subspan(sequence * each_, each_);
}
std::span<const RaggedCache::Part> RaggedCache::parts(std::size_t sequence) const {
  return std::span(parts_).subspan(sequence * each_, each_);
}

void RaggedCache::advance(std::size_t sequence, Index next) {
  constexpr Index kDead = 16;  // this part of the tokens may be dead
  const MaskPtr& mask = decoding_.masks[sequence];
  const Index capacity = decoding_.capacity[sequence];
  for (std::size_t p = 0; p < each_; ++p) {
    Part& part = parts(sequence)[p];
    if (part.next == next) continue;
    CHECK(part.next < next && next <= capacity, part.next, next, capacity);
    part.next = next;
    const Part* before = sequence > 0 ? &parts(sequence - 1)[p] : nullptr;
    if (before != nullptr && before->next == next && decoding_.masks[sequence - 1] == mask) {
      part.kept = before->kept;
    } else {
      part.kept = keys_kept(*mask, part.heads, {next, capacity - next, 1}, capacity);
    }
    part.live = std::count_if(part.tokens.begin(), part.tokens.end(),
                              [&](Index token) { return holds(part.kept, token); });
    const Index there = std::ssize(part.tokens);
    if ((there - part.live) * kDead <= there) continue;
    Index row = 0;
    for (Index from = 0; from < there; ++from) {
      const Index token = part.tokens[static_cast<std::size_t>(from)];
      if (!holds(part.kept, token)) continue;
      if (row < from) {
        std::memcpy(part.k.get() + row * part.k_row, part.k.get() + from * part.k_row,
                    static_cast<std::size_t>(part.k_row));
        std::memcpy(part.v.get() + row * part.v_row, part.v.get() + from * part.v_row,
                    static_cast<std::size_t>(part.v_row));
        part.tokens[static_cast<std::size_t>(row)] = token;
      }
      ++row;
    }
    part.tokens.resize(static_cast<std::size_t>(row));
    part.k.give_back({row * part.k_row, there * part.k_row});
    part.v.give_back({row * part.v_row, there * part.v_row});
  }
}

bool RaggedCache::wants(std::size_t sequence, Index token) const {
  const auto all = parts(sequence);
  return own_[static_cast<std::size_t>(firsts_[sequence] + token)] &&
         std::any_of(all.begin(), all.end(),
                     [&](const Part& part) { return holds(part.kept, token); });
}

void RaggedCache::append(std::size_t sequence, Index token, const std::byte* k,
                         const std::byte* v) {
  for (Part& part : parts(sequence)) {
    CHECK(part.tokens.empty() || part.tokens.back() < token, part.tokens.back(), token);
    if (!holds(part.kept, token)) continue;
    const Index row = std::ssize(part.tokens);
    std::memcpy(part.k.get() + row * part.k_row,
                k + row_bytes(problem_, Kind::K, {0, part.key_heads.begin}),
                static_cast<std::size_t>(part.k_row));
    std::memcpy(part.v.get() + row * part.v_row,
                v + row_bytes(problem_, Kind::V, {0, part.value_heads.begin}),
                static_cast<std::size_t>(part.v_row));
    part.tokens.push_back(token);
    ++part.live;
  }
}

std::vector<Index> RaggedCache::tokens() const {
  std::vector<Index> by_head(static_cast<std::size_t>(decoding_.key_heads), 0);
  for (const Part& part : parts_) {
    for (Index h = part.key_heads.begin; h < part.key_heads.end; ++h) {
      by_head[static_cast<std::size_t>(h)] += part.live;
    }
  }
  return by_head;
}

Index RaggedCache::bytes() const {
  return std::accumulate(parts_.begin(), parts_.end(), Index{0}, [](Index sum, const Part& part) {
    return sum + part.live * (part.k_row + part.v_row);
  });
}

Index RaggedCache::held_bytes() const {
  return std::accumulate(parts_.begin(), parts_.end(), Index{0}, [](Index sum, const Part& part) {
    return sum + std::ssize(part.tokens) * (part.k_row + part.v_row);
  });
}

template <class E>
void RaggedCache::attend(View<const E> q, View<float> out, const Ranges& heads,
                         std::span<const Index> lengths, const Work& work) const {
  CHECK(lengths.size() == decoding_.masks.size(), lengths.size(), decoding_.masks.size());
  const Shape& shape = problem_.shape();
  for (const Part& part : parts_) {
    const auto count = std::ssize(part.tokens);
    if (count == 0) continue;
    Runs keys;
    for (const Index token : part.tokens) {
      Run* last = keys.empty() ? nullptr : &keys.back();
      if (last != nullptr && last->count == 1) last->step = token - last->first;
      if (last != nullptr && last->at(last->count) == token) {
        ++last->count;
      } else {
        keys.push_back({token, 1, 1});
      }
    }
    const Index first = static_cast<Index>(part.sequence) * decoding_.queries;
    const Range rows{first, first + decoding_.queries};
    const Where where{shape,
                      part.heads,
                      part.key_heads,
                      part.value_heads,
                      {{lengths[part.sequence] - decoding_.queries, decoding_.queries, 1}},
                      keys};
    const UpToItself seen(decoding_.masks[part.sequence]);
    const Range place = place_among(heads, part.heads);
    dattn::attend(q.part(rows).only(place),
                  View<const E>{reinterpret_cast<const E*>(part.k.get()), count,
                                part.key_heads.size(), shape.d_qk},
                  View<const E>{reinterpret_cast<const E*>(part.v.get()), count,
                                part.value_heads.size(), shape.d_v},
                  out.part(rows).only(place), where, seen, work);
  }
}

template void RaggedCache::attend(View<const float>, View<float>, const Ranges&,
                                  std::span<const Index>, const Work&) const;
template void RaggedCache::attend(View<const BFloat16>, View<float>, const Ranges&,
                                  std::span<const Index>, const Work&) const;

Index ragged_bytes(const Decoding& decoding, const Problem& problem, const Program& program,
                   std::span<const Index> context) {
  const std::vector<bool> own = own_positions(problem, program);
  const std::vector<Range> heads = heads_alike(problem, program);
  Index sum = 0;
  for (std::size_t s = 0; s < context.size(); ++s) {
    const auto from = own.begin() + decoding.first(s);
    const Index capacity = decoding.capacity[s];
    for (const Range some : heads) {
      const Run later{context[s], capacity - context[s], 1};
      Index tokens = 0;
      for (const Range kept : keys_kept(*decoding.masks[s], some, later, capacity)) {
        tokens += std::count(from + kept.begin, from + kept.end, true);
      }
      sum += tokens * (row_bytes(problem, Kind::K, problem.shape().key_heads_of(some)) +
                       row_bytes(problem, Kind::V, problem.shape().value_heads_of(some)));
    }
  }
  return sum;
}

}  // namespace dattn
