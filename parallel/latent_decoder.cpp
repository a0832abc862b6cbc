#include "parallel/latent_decoder.hpp"

#include <algorithm>

#include "kernels/bfloat.hpp"
#include "kernels/check.hpp"
#include "kernels/latent/attention.hpp"
#include "kernels/latent/operators.hpp"
#include "parallel/latent_parts.hpp"
#include "parallel/latent_prefill.hpp"
#include "parallel/latent_values.hpp"

namespace dattn {
namespace {

/// Rows of hidden states and of the cache that are made at a time.
constexpr Index kRows = 512;
constexpr int kHeadsAxis = 1;  ///< of the mesh tokens x heads

/// The smallest Range with all of these heads.
Range hull(const Ranges& a, const Ranges& b) {
  Range all{0, 0};
  for (const Ranges* heads : {&a, &b}) {
    for (const Range r : *heads) {
      all = all.empty() ? r : Range{std::min(all.begin, r.begin), std::max(all.end, r.end)};
    }
  }
  return all;
}

/// Neighbouring heads as one Range. @pre they are neighbours
Range as_range(const Ranges& heads) {
  CHECK(heads.size() <= 1, heads.size());
  return heads.empty() ? Range{} : heads.front();
}

}  // namespace

Decoding latent_decoding(const LatentSizes& sizes, std::vector<Index> capacity, Index queries,
                         Type type) {
  return {.capacity = std::move(capacity),
          .queries = queries,
          .query_heads = sizes.heads,
          .d_qk = sizes.row(),
          .d_v = sizes.kv_rank,
          .values_in_keys = true,
          .type = type};
}

template <comm::Transport T>
LatentDecoder<T>::LatentDecoder(const LatentSizes& sizes, const MakeWeights& weights,
                                const Decoding& decoding, const Strategy& form,
                                std::optional<Mesh> mesh, T& transport, EngineOptions options,
                                Type weight_type, const Hosts& hosts, Values values)
    : transport_(transport),
      verifies_(options.verify_wire),
      all_reduce_(transport, all_ranks(transport.size()), hosts, verifies_),
      work_(scaled({.threads = options.threads, .isa = options.isa}, sizes)),
      decoder_(
          decoding, form, std::move(mesh), transport,
          [&] {
            options.score = work_.score;
            return options;
          }(),
          hosts, values == Values::after),
      sizes_(sizes),
      values_([&] {
        if (values == Values::after) return std::unique_ptr<const PartialValues>();
        std::vector<Range> parts;  // a rank gets the heads whose queries it makes
        for (int r = 0; r < transport.size(); ++r) {
          const Program theirs = form.program(decoder_.problem(), r);
          parts.push_back(as_range(theirs.result(Kind::O).block.heads));
        }
        return std::make_unique<const PartialValues>(sizes, weights, std::move(parts), weight_type);
      }()),
      weights_(stored(weights(hull(decoder_.asks(), gets())), weight_type)),
      down_(weights_, all_reduce_) {}

template <comm::Transport T>
LatentDecoder<T>::~LatentDecoder() = default;

template <comm::Transport T>
void LatentDecoder<T>::fill(std::span<const Index> lengths, const Hidden& hidden) {
  // As a prefill makes them, and as they lie: the tokens of a rank, of each rank that this one has
  // tokens of.
  for (const Stretch& stretch : decoder_.decoding().stretches(lengths)) {
    for (const int owner : owners()) {
      const Run theirs = own_positions(stretch.keys, transport_.size(), owner);
      for (Range some{0, 0}; some.end < theirs.count;) {
        some = {some.end, std::min(theirs.count, some.end + kRows)};
        const Run positions = theirs.part(some);
        decoder_.decoding().type == Type::bf16 ? write<BFloat16>(stretch, positions, hidden)
                                               : write<float>(stretch, positions, hidden);
      }
    }
  }
}

/// The ranks whose tokens this one has whole rows of: those of its row of the mesh, if it has
/// heads.
template <comm::Transport T>
std::vector<int> LatentDecoder<T>::owners() {
  if (size(decoder_.cache().heads(Kind::K)) == 0) return {};
  return decoder_.problem().mesh().group(transport_.rank(), kHeadsAxis);
}

template <comm::Transport T>
HandOver LatentDecoder<T>::take(std::span<const std::byte> rows, std::span<const Index> lengths) {
  KvCache& cache = decoder_.cache();
  const Decoding& d = decoder_.decoding();
  const Problem& problem = decoder_.problem();
  const Mesh& mesh = problem.mesh();
  const auto ranks = static_cast<std::size_t>(transport_.size());
  const Index row = sizes_.row() * bytes_of(d.type);
  std::vector<comm::ConstStrips> to(ranks);
  std::vector<comm::Strips> from(ranks);
  const Placement& heads = problem.placement(mesh.axes[kHeadsAxis].size);
  for (const int peer : mesh.group(transport_.rank(), kHeadsAxis)) {
    const auto column = static_cast<std::size_t>(mesh.coordinate(peer, kHeadsAxis));
    if (size(heads.heads[column]) > 0) {
      to[static_cast<std::size_t>(peer)] = comm::strips_of(rows);
    }
  }
  for (const int peer : owners()) {
    const auto p = static_cast<std::size_t>(peer);
    for (const Stretch& stretch : d.stretches(lengths)) {
      const Run theirs = own_positions(stretch.keys, transport_.size(), peer);
      if (theirs.count == 0) continue;
      const auto first = cache.row_of(theirs.first);
      const auto last = cache.row_of(theirs.at(theirs.count - 1));
      CHECK(first && last && *last - *first == theirs.count - 1, peer, theirs.first);
      from[p].push_back({cache.keys(*first), 1, theirs.count * row, theirs.count * row});
    }
  }
  return exchange(transport_, to, from, decoder_.problem().hosts(),
                  SealedMessages<T>(transport_, "rows of the cache", verifies_));
}

template <comm::Transport T>
void LatentDecoder<T>::draw(std::span<const Index> lengths) {
  KvCache& cache = decoder_.cache();
  const Decoding& d = decoder_.decoding();
  for (const Stretch& stretch : d.stretches(lengths)) {
    for (Index position = stretch.keys.begin; position < stretch.keys.end; ++position) {
      const auto row = cache.row_of(position);
      if (!row) continue;
      const auto seed = static_cast<std::uint64_t>(position);
      std::byte* to = cache.keys(*row);
      d.type == Type::bf16 ? draw_numbers(reinterpret_cast<BFloat16*>(to), d.d_qk, seed)
                           : draw_numbers(reinterpret_cast<float*>(to), d.d_qk, seed);
    }
  }
}

/// Where the tokens at these positions, which this rank has, lie one behind the other: [tokens, 1,
/// row].
template <comm::Transport T>
template <class E>
View<E> LatentDecoder<T>::rows_of(const Run& positions) {
  KvCache& cache = decoder_.cache();
  const auto begin = cache.row_of(positions.first);
  const auto last = cache.row_of(positions.at(positions.count - 1));
  CHECK(begin && last && *last - *begin == positions.count - 1, positions.first, positions.count);
  return {reinterpret_cast<E*>(cache.keys(*begin)), positions.count, 1, sizes_.row()};
}

template <comm::Transport T>
template <class E>
void LatentDecoder<T>::write(const Stretch& stretch, const Run& positions, const Hidden& hidden) {
  const View<E> rows = rows_of<E>(positions);
  const Run tokens = stretch.tokens(positions);
  std::vector<float> x(static_cast<std::size_t>(tokens.count * sizes_.model));
  hidden(stretch.sequence(), {tokens}, x.data());
  const View<const float> from{x.data(), tokens.count, 1, sizes_.model};
  std::visit([&](const auto& w) { latent_rows<E>(w, from, {tokens}, rows, work_); }, weights_);
}

/// Writes the rows of those new tokens that this rank has, from the latents that all made.
template <comm::Transport T>
template <class E>
void LatentDecoder<T>::append(std::span<const Index> lengths) {
  const Decoding& d = decoder_.decoding();
  const View<const float> made = down_.latents();
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    const Index end = d.first(s) + lengths[s];
    const auto n = static_cast<Index>(s);
    const Stretch fresh{{end - d.queries, end}, {n, n + 1}, d.before(s) + lengths[s] - d.queries};
    for (const int owner : owners()) {
      const Run theirs = own_positions(fresh.keys, transport_.size(), owner);
      if (theirs.count == 0) continue;
      const Index row = static_cast<Index>(s) * d.queries + theirs.first - fresh.keys.begin;
      const View<const float> c{made.at(row, 0), theirs.count, 1, made.dim,
                                theirs.step * made.row_stride()};
      const View<E> rows = rows_of<E>(theirs);
      std::visit([&](const auto& w) { cache_rows<E>(w, c, {}, {fresh.tokens(theirs)}, rows); },
                 weights_);
    }
  }
}

template <comm::Transport T>
template <class E>
void LatentDecoder<T>::make_queries(std::span<const Index> lengths) {
  const Range heads = as_range(decoder_.asks());
  if (heads.empty()) return;
  const Decoding& d = decoder_.decoding();
  Runs positions;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    positions.push_back({d.before(s) + lengths[s] - d.queries, d.queries, 1});
  }
  const View<const float> made = down_.queries();
  std::vector<float> numbers(static_cast<std::size_t>(made.rows * heads.size() * sizes_.d_qk()));
  const View<float> expanded{numbers.data(), made.rows, heads.size(), sizes_.d_qk()};
  const View<E> q{reinterpret_cast<E*>(decoder_.queries().data()), made.rows, heads.size(),
                  sizes_.row()};
  std::visit(
      [&](const auto& w) {
        expanded_queries(w, heads, made, positions, expanded, work_);
        absorb<E>(w, heads, View<const float>(expanded), q, work_);
      },
      weights_);
}

/// O of the heads of gets(), of latents or, where W_UV comes before the merge, of values.
template <comm::Transport T>
std::vector<float> LatentDecoder<T>::attend(std::span<const Index> lengths, LatentTimes& times) {
  times.attention = decoder_.step(lengths);
  times.bytes_sent += times.attention.bytes_sent;
  times.between_hosts += times.attention.between_hosts;
  times.messages += times.attention.messages;
  times.envelopes += times.attention.envelopes;
  const Index rows = decoder_.decoding().queries * static_cast<Index>(lengths.size());
  const Index heads = size(decoder_.gets());
  std::vector<float> o(static_cast<std::size_t>(rows * heads * sizes_.kv_rank));
  lse_.resize(static_cast<std::size_t>(rows * heads));
  decoder_.result(o, lse_);
  if (!values_) return o;
  const double start = seconds_now();
  std::vector<float> values;
  std::vector<float> lse;
  const HandOver done =
      values_->merge(transport_, decoder_.problem().hosts(),
                     {o.data(), rows, heads, sizes_.kv_rank}, lse_, values, lse, work_, verifies_);
  times.attention.wait += done.seconds;
  times.project += seconds_now() - start - done.seconds;
  times.bytes_sent += done.bytes_sent;
  times.between_hosts += done.between_hosts;
  times.messages += done.messages;
  times.envelopes += done.envelopes;
  lse_ = std::move(lse);
  return values;
}

template <comm::Transport T>
LatentTimes LatentDecoder<T>::step(std::span<const Index> lengths, View<const float> x,
                                   std::span<float> y) {
  const LatentSizes& sizes = sizes_;
  const Index each = decoder_.decoding().queries;
  CHECK(x.rows == each * static_cast<Index>(lengths.size()) && x.dim == sizes.model, x.rows, x.dim);
  CHECK(static_cast<Index>(y.size()) == x.rows * sizes.model, y.size());
  LatentTimes times;
  const double start = seconds_now();
  down_.make(x, work_, times);
  const double down = seconds_now();
  const bool narrow = decoder_.decoding().type == Type::bf16;
  narrow ? append<BFloat16>(lengths) : append<float>(lengths);
  narrow ? make_queries<BFloat16>(lengths) : make_queries<float>(lengths);
  times.project += seconds_now() - down;
  const std::vector<float> o = attend(lengths, times);
  const double attended = seconds_now();
  const Range heads = as_range(gets());
  std::fill(y.begin(), y.end(), 0.0F);
  if (!heads.empty()) {
    const View<float> to{y.data(), x.rows, 1, sizes.model};
    const View<const float> got{o.data(), x.rows, heads.size(),
                                values_ ? sizes.d_v : sizes.kv_rank};
    std::visit(
        [&](const auto& w) {
          values_ ? project_out(w, heads, got, to, work_) : values_out(w, heads, got, to, work_);
        },
        weights_);
  }
  times.project += seconds_now() - attended;
  times.reduce = add_up(all_reduce_, y, times);
  times.seconds = seconds_now() - start;
  return times;
}

template class LatentDecoder<comm::Communicator>;
template class LatentDecoder<comm::Loopback::Endpoint>;

}  // namespace dattn
