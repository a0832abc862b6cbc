#include "parallel/latent_prefill.hpp"

#include <algorithm>
#include <numeric>
#include <type_traits>

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

/// Bytes of a token's query and Partials of a head.
Index bytes_a_head(const LatentSizes& sizes, Type type) {
  return sizes.d_qk() * bytes_of(type) + record_length(sizes.d_v) * bytes_of(Type::f4);
}

/// Heads whose queries and Partials are there at a time: as many as are expanded, since all heads
/// take far more than the latents of some ranks do. Where ranks are so many that they take less,
/// all, and no latents are kept.
Index heads_at_once(const LatentSizes& sizes, Type type, int ranks) {
  const Index latents = ranks * sizes.row() * bytes_of(type);
  const Index others = (sizes.heads - kHeads) * bytes_a_head(sizes, type);
  return latents < others ? kHeads : sizes.heads;
}

/// Numbers that are float where the kernel works on float: nothing to convert.
template <class E>
void convert(const float* from, Index count, E* to) {
  if constexpr (!std::is_same_v<E, float>) {
    std::transform(from, from + count, to, [](float x) { return E(x); });
  }
}

}  // namespace

Run own_tokens(const Decoding& decoding, std::size_t sequence, Index length, int ranks, int rank) {
  const Index begin = decoding.first(sequence);
  const Run own = own_positions({begin, begin + length}, ranks, rank);
  return {own.first - begin, own.count, own.step};
}

Index prefill_bytes(const LatentSizes& sizes, const Decoding& decoding,
                    std::span<const Index> lengths, int ranks, int threads) {
  Index tokens = 0;
  for (const Stretch& s : decoding.stretches(lengths))
    tokens += (s.keys.size() + ranks - 1) / ranks;
  const bool narrow = decoding.type == Type::bf16;
  const Index heads = std::min(sizes.heads, kHeads);
  const Index at_once = heads_at_once(sizes, decoding.type, ranks);
  const Index blocks = at_once < sizes.heads ? ranks : std::min(ranks, 3);  // of latents
  const Index kept =
      tokens * (at_once * bytes_a_head(sizes, decoding.type) + 4 * (sizes.q_width() + sizes.model) +
                blocks * sizes.row() * bytes_of(decoding.type));
  const Index some =
      kKeys * (heads * (sizes.d_qk() + sizes.d_v) * (narrow ? 6 : 4) + 4 * sizes.row()) +
      4 * kRows *
          (sizes.model + sizes.q_width() + sizes.row() +
           at_once * std::max(sizes.d_qk(), sizes.d_v + 1));
  Shape shape = expanded_shape(sizes, tokens, tokens);
  shape.query_heads = shape.key_heads = shape.value_heads = heads;
  return kept + some +
         attend_bytes(shape, tokens, heads, kKeys, threads,
                      narrow ? *chosen_isa().bf16 : *chosen_isa().f4);
}

template <comm::Transport T>
LatentPrefill<T>::LatentPrefill(const LatentSizes& sizes, LatentWeights weights,
                                const Decoding& decoding, std::vector<Index> lengths, T& transport,
                                EngineOptions options, Type weight_type, const Hosts& hosts)
    : sizes_(sizes),
      weights_(stored(std::move(weights), weight_type)),
      decoding_(decoding),
      lengths_(std::move(lengths)),
      transport_(transport),
      work_(scaled({.threads = options.threads, .isa = options.isa, .workspace = &workspace_},
                   sizes)),
      keeps_(heads_at_once(sizes, decoding.type, transport.size()) < sizes.heads) {
  std::visit([&](const auto& w) { CHECK(w.part == whole(sizes), w.part.heads.end); }, weights_);
  CHECK(lengths_.size() == decoding.capacity.size(), lengths_.size(), decoding.capacity.size());
  for (std::size_t s = 0; s < lengths_.size(); ++s) {
    CHECK(0 <= lengths_[s] && lengths_[s] <= decoding.capacity[s], s, lengths_[s]);
  }
  stretches_ = decoding_.stretches(lengths_);
  const auto has_token = [](const Stretch& stretch) { return !stretch.keys.empty(); };
  if (std::none_of(stretches_.begin(), stretches_.end(), has_token)) return;
  problem_.emplace(prefill_problem(decoding_, lengths_, sizes.row(), transport.size(), hosts));
  Plan plan = prefill_plan(*problem_, keeps_);
  program_ = std::move(plan[static_cast<std::size_t>(transport.rank())]);
  options.score = work_.score;
  options.attend = [this](const Attend& step, const std::byte*, const std::byte* k, std::byte*,
                          const Mask&, const Work& work) {
    const Block& block = program_.slots[static_cast<std::size_t>(step.k)].block;
    const int owner = problem_->keys().owner(block.rows.front().begin);
    decoding_.type == Type::bf16 ? meet<BFloat16>(k, owner, asking_, work)
                                 : meet<float>(k, owner, asking_, work);
  };
  engine_ = std::make_unique<Engine<T>>(*problem_, program_, transport, std::move(options));
  static constexpr std::byte kNothing{};  // queries are ours, and nobody reads these
  engine_->bind(program_.input(Kind::Q), &kNothing, sizes.row() * bytes_of(decoding_.type));
}

template <comm::Transport T>
Index LatentPrefill<T>::tokens_of(int rank) const {
  Index count = 0;
  for (const Stretch& stretch : stretches_) {
    count += own_positions(stretch.keys, transport_.size(), rank).count;
  }
  return count;
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
  c_q_.resize(static_cast<std::size_t>(tokens * sizes_.q_width()));
  const View<E> rows{reinterpret_cast<E*>(rows_.data()), tokens, 1, sizes_.row()};
  const View<float> c_q{c_q_.data(), tokens, 1, sizes_.q_width()};
  std::vector<float> x(static_cast<std::size_t>(kRows * sizes_.model));
  Index at = 0;
  for (const Stretch& stretch : stretches_) {
    const Run own = own_positions(stretch.keys, transport_.size(), transport_.rank());
    for (Range some{0, 0}; some.end < own.count; at += some.size()) {
      some = {some.end, std::min(own.count, some.end + kRows)};
      const Runs positions{stretch.tokens(own.part(some))};
      hidden(stretch.sequence(), positions, x.data());
      const View<const float> from{x.data(), some.size(), 1, sizes_.model};
      const Range here{at, at + some.size()};
      std::visit(
          [&](const auto& w) {
            latent_rows<E>(w, from, positions, rows.part(here), work_);
            compressed_queries(w, from, c_q.part(here), work_);
          },
          weights_);
    }
  }
}

/// Makes the queries of some heads, which have met nothing yet.
template <comm::Transport T>
template <class E>
void LatentPrefill<T>::ask(Range heads) {
  const Index tokens = tokens_of(transport_.rank());
  const Index numbers = heads.size() * sizes_.d_qk();  // of a token
  q_.resize(static_cast<std::size_t>(tokens * numbers) * sizeof(E));
  records_.resize(static_cast<std::size_t>(tokens * heads.size() * record_length(sizes_.d_v)));
  start(View<float>{records_.data(), tokens, heads.size(), record_length(sizes_.d_v)});
  const View<const float> c_q{c_q_.data(), tokens, 1, sizes_.q_width()};
  constexpr bool kIsFloat = std::is_same_v<E, float>;
  const Buffer<float> wide(kIsFloat ? 0 : std::min(kRows, tokens) * numbers);
  Index at = 0;
  for (const Stretch& stretch : stretches_) {
    const Run own = own_positions(stretch.keys, transport_.size(), transport_.rank());
    for (Range some{0, 0}; some.end < own.count; at += some.size()) {
      some = {some.end, std::min(own.count, some.end + kRows)};
      const Range here{at, at + some.size()};
      E* to = reinterpret_cast<E*>(q_.data()) + at * numbers;
      float* made = wide.get();
      if constexpr (kIsFloat) made = to;
      const View<float> q{made, some.size(), heads.size(), sizes_.d_qk()};
      std::visit(
          [&](const auto& w) {
            expanded_queries(w, heads, c_q.part(here), {stretch.tokens(own.part(some))}, q, work_);
          },
          weights_);
      convert(made, q.size(), to);
    }
  }
}

/// The queries of some heads meet the keys of the tokens of `owner`, whose rows lie at `block`.
template <comm::Transport T>
template <class E>
void LatentPrefill<T>::meet(const std::byte* block, int owner, Range asking_heads,
                            const Work& work) {
  const int ranks = transport_.size();
  const Index tokens = tokens_of(transport_.rank());
  const Index most_keys = std::min(kKeys, tokens_of(owner));
  const Index most_heads = std::min(kHeads, asking_heads.size());
  constexpr bool kIsFloat = std::is_same_v<E, float>;
  const View<const E> rows{reinterpret_cast<const E*>(block), tokens_of(owner), 1, sizes_.row()};
  const View<const E> q{reinterpret_cast<const E*>(q_.data()), tokens, asking_heads.size(),
                        sizes_.d_qk()};
  const View<float> records{records_.data(), tokens, asking_heads.size(),
                            record_length(sizes_.d_v)};
  const Buffer<float> keys(most_keys * most_heads * sizes_.d_qk());
  const Buffer<float> values(most_keys * most_heads * sizes_.d_v);
  const Buffer<E> narrow_keys(kIsFloat ? 0 : most_keys * most_heads * sizes_.d_qk());
  const Buffer<E> narrow_values(kIsFloat ? 0 : most_keys * most_heads * sizes_.d_v);
  // The own tokens, where they stand in their sequences, and their first rows.
  struct Asking {
    const Stretch& stretch;
    Run tokens;
    Index row;
  };
  std::vector<Asking> all;
  Index length = 0;  // of the longest sequence
  Index q_row = 0;
  for (const Stretch& stretch : stretches_) {
    const Run own = own_positions(stretch.keys, ranks, transport_.rank());
    if (own.count > 0) all.push_back({stretch, stretch.tokens(own), q_row});
    q_row += own.count;
    length = std::max(length, stretch.before + stretch.keys.size());
  }
  if (all.empty()) return;
  const Shape shape = expanded_shape(sizes_, length, length);
  const MaskPtr mask = parse_mask("causal", shape);
  Index k_row = 0;
  for (const Stretch& stretch : stretches_) {
    const Run seen = stretch.tokens(own_positions(stretch.keys, ranks, owner));
    for (Range some{0, 0}; some.end < seen.count;) {
      some = {some.end, std::min(seen.count, some.end + kKeys)};
      const Run at = seen.part(some);
      const auto sees = [&](const Asking& one) {
        return one.stretch.sees(stretch) && at.first <= one.tokens.at(one.tokens.count - 1);
      };
      if (std::none_of(all.begin(), all.end(), sees)) continue;
      for (Range heads{0, asking_heads.begin}; heads.end < asking_heads.end;) {
        heads = {heads.end, std::min(asking_heads.end, heads.end + kHeads)};
        const Range here{heads.begin - asking_heads.begin, heads.end - asking_heads.begin};
        const View<float> k{keys.get(), at.count, heads.size(), sizes_.d_qk()};
        const View<float> v{values.get(), at.count, heads.size(), sizes_.d_v};
        const View<const E> from = rows.part({k_row + some.begin, k_row + some.end});
        std::visit([&](const auto& w) { expand<E>(w, heads, from, k, v, work); }, weights_);
        View<const E> narrow_k{narrow_keys.get(), k.rows, k.heads, k.dim};
        View<const E> narrow_v{narrow_values.get(), v.rows, v.heads, v.dim};
        if constexpr (kIsFloat) {
          narrow_k = k;
          narrow_v = v;
        } else {
          convert(k.data, k.size(), narrow_keys.get());
          convert(v.data, v.size(), narrow_values.get());
        }
        for (const Asking& one : all) {
          if (!sees(one)) continue;
          const Range mine{one.row, one.row + one.tokens.count};
          attend(q.part(mine).only(here), narrow_k, narrow_v, records.part(mine).only(here),
                 {shape, heads, heads, heads, {one.tokens}, {at}}, *mask, work);
        }
      }
    }
    k_row += seen.count;
  }
}

template <comm::Transport T>
LatentTimes LatentPrefill<T>::run() {
  LatentTimes times;
  const double start = seconds_now();
  const Index at_once = heads_at_once(sizes_, decoding_.type, transport_.size());
  y_.assign(static_cast<std::size_t>(tokens_of(transport_.rank()) * sizes_.model), 0.0F);
  if (engine_) engine_->bind(program_.input(Kind::K), std::span<const std::byte>(rows_));
  while (engine_ && asking_.end < sizes_.heads) {
    const bool is_first = asking_.end == 0;  // for these the ring turns
    asking_ = {asking_.end, std::min(sizes_.heads, asking_.end + at_once)};
    double from = seconds_now();
    decoding_.type == Type::bf16 ? ask<BFloat16>(asking_) : ask<float>(asking_);
    times.project += seconds_now() - from;
    const RunTimes run = engine_->run({.messages = is_first});
    times.attention.compute += run.compute;
    times.attention.wait += run.wait;
    times.attention.hidden += run.hidden;
    times.bytes_sent += run.bytes_sent;
    times.between_hosts += run.between_hosts;
    times.messages += run.messages;
    times.envelopes += run.envelopes;
    from = seconds_now();
    put_out(asking_);
    times.project += seconds_now() - from;
  }
  engine_.reset();
  c_q_ = {};
  q_ = {};
  records_ = {};
  weights_ = {};
  times.seconds = seconds_now() - start;
  return times;
}

/// Adds what some heads have found to y.
template <comm::Transport T>
void LatentPrefill<T>::put_out(Range all) {
  const Index tokens = tokens_of(transport_.rank());
  const View<const float> records{records_.data(), tokens, all.size(), record_length(sizes_.d_v)};
  const View<float> y{y_.data(), tokens, 1, sizes_.model};
  std::vector<float> o, lse;
  for (Range some{0, 0}; some.end < tokens;) {
    some = {some.end, std::min(tokens, some.end + kRows)};
    o.resize(static_cast<std::size_t>(some.size() * all.size() * sizes_.d_v));
    lse.resize(static_cast<std::size_t>(some.size() * all.size()));
    finish(records.part(some), std::span(o), std::span(lse));
    const View<const float> heads{o.data(), some.size(), all.size(), sizes_.d_v};
    std::visit([&](const auto& w) { project_out(w, all, heads, y.part(some), work_); }, weights_);
  }
}

template class LatentPrefill<comm::Communicator>;
template class LatentPrefill<comm::Loopback::Endpoint>;

}  // namespace dattn
