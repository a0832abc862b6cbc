#include "parallel/latent_prefill.hpp"

#include <algorithm>
#include <numeric>

#include "kernels/bfloat.hpp"
#include "kernels/check.hpp"
#include "kernels/latent/attention.hpp"
#include "kernels/latent/operators.hpp"
#include "kernels/mask.hpp"
#include "kernels/partial.hpp"
#include "parallel/latent_parts.hpp"

namespace dattn {
namespace {

constexpr Index kRows = 512;   ///< tokens whose hidden states are there at a time
constexpr Index kKeys = 1024;  ///< keys, and
constexpr Index kHeads = 16;   ///< heads, that are expanded at a time

Index own_count(const Decoding& decoding, std::span<const Index> lengths, int ranks, int rank) {
  Index count = 0;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    count += own_tokens(decoding, s, lengths[s], ranks, rank).count;
  }
  return count;
}

}  // namespace

Run own_positions(Range keys, int ranks, int rank) {
  const Index first = keys.begin + (rank - keys.begin % ranks + ranks) % ranks;
  return {first, first < keys.end ? (keys.end - first + ranks - 1) / ranks : 0, ranks};
}

Run own_tokens(const Decoding& decoding, std::size_t sequence, Index length, int ranks, int rank) {
  const Index begin = decoding.first(sequence);
  const Run own = own_positions({begin, begin + length}, ranks, rank);
  return {own.first - begin, own.count, own.step};
}

Index prefill_bytes(const LatentSizes& sizes, const Decoding& decoding,
                    std::span<const Index> lengths, int ranks, int threads) {
  Index tokens = 0;
  for (const Index length : lengths) tokens += (length + ranks - 1) / ranks;
  const Index heads = std::min(sizes.heads, kHeads);
  const Index kept = tokens * (sizes.heads * (sizes.d_qk() + sizes.d_v + 2) + sizes.model);
  const Index some = kKeys * (heads * (sizes.d_qk() + sizes.d_v) + sizes.row()) +
                     kRows * (sizes.model + sizes.q_rank + sizes.row() + sizes.heads * sizes.d_v);
  Shape shape = expanded_shape(sizes, tokens, tokens);
  shape.query_heads = shape.key_heads = shape.value_heads = heads;
  return 4 * (kept + some) + 3 * tokens * sizes.row() * bytes_of(decoding.type) +
         attend_bytes(shape, tokens, heads, kKeys, threads, *chosen_isa().f4);
}

template <comm::Transport T>
LatentPrefill<T>::LatentPrefill(const LatentSizes& sizes, LatentWeights weights,
                                const Decoding& decoding, std::vector<Index> lengths, T& transport,
                                EngineOptions options, Type weight_type)
    : sizes_(sizes),
      weights_(stored(std::move(weights), weight_type)),
      decoding_(decoding),
      lengths_(std::move(lengths)),
      transport_(transport),
      work_(scaled({.threads = options.threads, .isa = options.isa, .workspace = &workspace_},
                   sizes)) {
  std::visit([&](const auto& w) { CHECK(w.part == whole(sizes), w.part.heads.end); }, weights_);
  CHECK(lengths_.size() == decoding.capacity.size(), lengths_.size(), decoding.capacity.size());
  for (std::size_t s = 0; s < lengths_.size(); ++s) {
    CHECK(0 <= lengths_[s] && lengths_[s] <= decoding.capacity[s], s, lengths_[s]);
  }
  // Asked between tiles of kernels; a poll has its price even where nothing has come.
  work_.poll = [this, every = options.poll_every, next = 0.0]() mutable {
    const double now = seconds_now();
    if (now < next) return;
    next = now + every;
    transport_.poll();
  };
}

template <comm::Transport T>
Index LatentPrefill<T>::tokens_of(int rank) const {
  return own_count(decoding_, lengths_, transport_.size(), rank);
}

template <comm::Transport T>
std::size_t LatentPrefill<T>::block_bytes(int rank) const {
  return static_cast<std::size_t>(tokens_of(rank) * sizes_.row() * bytes_of(decoding_.type));
}

template <comm::Transport T>
void LatentPrefill<T>::make(const Hidden& hidden) {
  decoding_.type == Type::bf16 ? make_as<BFloat16>(hidden) : make_as<float>(hidden);
}

template <comm::Transport T>
template <class E>
void LatentPrefill<T>::make_as(const Hidden& hidden) {
  const Index tokens = tokens_of(transport_.rank());
  rows_.resize(block_bytes(transport_.rank()));
  q_.resize(static_cast<std::size_t>(tokens * sizes_.heads * sizes_.d_qk()));
  records_.resize(static_cast<std::size_t>(tokens * sizes_.heads * (sizes_.d_v + 2)));
  clear(View<float>{records_.data(), tokens, sizes_.heads, sizes_.d_v + 2});
  const View<E> rows{reinterpret_cast<E*>(rows_.data()), tokens, 1, sizes_.row()};
  const View<float> q{q_.data(), tokens, sizes_.heads, sizes_.d_qk()};
  std::vector<float> x(static_cast<std::size_t>(kRows * sizes_.model));
  std::vector<float> c_q(static_cast<std::size_t>(kRows * sizes_.q_width()));
  Work alone = work_;  // a rank may fail here: no other is heard
  alone.poll = {};
  Index at = 0;
  for (std::size_t s = 0; s < lengths_.size(); ++s) {
    const Run own = own_tokens(decoding_, s, lengths_[s], transport_.size(), transport_.rank());
    for (Range some{0, 0}; some.end < own.count; at += some.size()) {
      some = {some.end, std::min(own.count, some.end + kRows)};
      const Runs positions{own.part(some)};
      hidden(s, positions, x.data());
      const View<const float> from{x.data(), some.size(), 1, sizes_.model};
      const View<float> made{c_q.data(), some.size(), 1, sizes_.q_width()};
      const Range here{at, at + some.size()};
      std::visit(
          [&](const auto& w) {
            latent_rows<E>(w, from, positions, rows.part(here), alone);
            compressed_queries(w, from, made, alone);
            expanded_queries(w, {0, sizes_.heads}, made, positions, q.part(here), alone);
          },
          weights_);
    }
  }
}

/// The own queries meet the keys of the tokens of `owner`, whose rows `block` has.
template <comm::Transport T>
template <class E>
void LatentPrefill<T>::meet(std::span<const std::byte> block, int owner) {
  const int ranks = transport_.size();
  const Index tokens = tokens_of(transport_.rank());
  const Index most_keys = std::min(kKeys, tokens_of(owner));
  const Index most_heads = std::min(kHeads, sizes_.heads);
  const View<const E> rows{reinterpret_cast<const E*>(block.data()), tokens_of(owner), 1,
                           sizes_.row()};
  const View<const float> q{q_.data(), tokens, sizes_.heads, sizes_.d_qk()};
  const View<float> records{records_.data(), tokens, sizes_.heads, sizes_.d_v + 2};
  const Buffer<float> keys(most_keys * most_heads * sizes_.d_qk());
  const Buffer<float> values(most_keys * most_heads * sizes_.d_v);
  Index q_row = 0;
  Index k_row = 0;
  for (std::size_t s = 0; s < lengths_.size(); ++s) {
    const Run asking = own_tokens(decoding_, s, lengths_[s], ranks, transport_.rank());
    const Run seen = own_tokens(decoding_, s, lengths_[s], ranks, owner);
    Shape shape = expanded_shape(sizes_, lengths_[s], lengths_[s]);
    const MaskPtr mask = lengths_[s] > 0 ? parse_mask("causal", shape) : nullptr;
    for (Range some{0, 0}; asking.count > 0 && some.end < seen.count;) {
      some = {some.end, std::min(seen.count, some.end + kKeys)};
      const Run at = seen.part(some);
      if (at.first > asking.at(asking.count - 1)) break;  // nobody here sees them
      for (Range heads{0, 0}; heads.end < sizes_.heads;) {
        heads = {heads.end, std::min(sizes_.heads, heads.end + kHeads)};
        const View<float> k{keys.get(), at.count, heads.size(), sizes_.d_qk()};
        const View<float> v{values.get(), at.count, heads.size(), sizes_.d_v};
        const View<const E> from = rows.part({k_row + some.begin, k_row + some.end});
        std::visit([&](const auto& w) { expand<E>(w, heads, from, k, v, work_); }, weights_);
        const Range mine{q_row, q_row + asking.count};
        attend(q.part(mine).only(heads), View<const float>(k), View<const float>(v),
               records.part(mine).only(heads), {shape, heads, heads, heads, {asking}, {at}}, *mask,
               work_);
      }
    }
    q_row += asking.count;
    k_row += seen.count;
  }
}

template <comm::Transport T>
LatentTimes LatentPrefill<T>::run() {
  LatentTimes times;
  const double start = seconds_now();
  const int ranks = transport_.size();
  const int rank = transport_.rank();
  const int right = (rank + 1) % ranks;
  const int left = (rank + ranks - 1) % ranks;
  std::vector<std::byte> spares[2];
  std::span<const std::byte> held = rows_;
  for (int hop = 0; hop < ranks; ++hop) {
    // Hop by hop the rows of the next rank to the left come in, while those before are computed.
    const int owner = (rank + ranks - hop) % ranks;
    const int next = (owner + ranks - 1) % ranks;
    typename T::Request sent, arriving;
    std::vector<std::byte>& spare = spares[hop % 2];
    if (hop + 1 < ranks) {
      spare.resize(block_bytes(next));
      if (!spare.empty()) arriving = transport_.recv(comm::strips_of(std::span(spare)), left);
      if (!held.empty()) {
        sent = transport_.send(comm::strips_of(held), right);
        times.bytes_sent += std::ssize(held);
        ++times.messages;
      }
    }
    const double from = seconds_now();
    decoding_.type == Type::bf16 ? meet<BFloat16>(held, owner) : meet<float>(held, owner);
    const double met = seconds_now();
    arriving.wait();
    sent.wait();
    times.attention.compute += met - from;
    times.attention.wait += seconds_now() - met;
    if (hop + 1 < ranks) held = spare;
  }
  const double attended = seconds_now();
  finish();
  times.project = seconds_now() - attended;
  times.seconds = seconds_now() - start;
  return times;
}

/// Partials become y; what a prefill alone needs goes.
template <comm::Transport T>
void LatentPrefill<T>::finish() {
  q_ = {};
  const Index tokens = tokens_of(transport_.rank());
  const View<const float> records{records_.data(), tokens, sizes_.heads, sizes_.d_v + 2};
  y_.assign(static_cast<std::size_t>(tokens * sizes_.model), 0.0F);
  const View<float> y{y_.data(), tokens, 1, sizes_.model};
  std::vector<float> o, lse;
  for (Range some{0, 0}; some.end < tokens;) {
    some = {some.end, std::min(tokens, some.end + kRows)};
    o.resize(static_cast<std::size_t>(some.size() * sizes_.heads * sizes_.d_v));
    lse.resize(static_cast<std::size_t>(some.size() * sizes_.heads));
    dattn::finish(records.part(some), std::span(o), std::span(lse));
    const View<const float> heads{o.data(), some.size(), sizes_.heads, sizes_.d_v};
    std::visit(
        [&](const auto& w) {
          project_out(w, {0, sizes_.heads}, heads, y.part(some), work_);
        },
        weights_);
  }
  records_ = {};
  weights_ = {};
}

template class LatentPrefill<comm::Communicator>;
template class LatentPrefill<comm::Loopback::Endpoint>;

}  // namespace dattn
