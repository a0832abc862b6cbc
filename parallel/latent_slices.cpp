#include "parallel/latent_slices.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/bfloat.hpp"
#include "kernels/check.hpp"
#include "kernels/latent/attention.hpp"
#include "kernels/latent/basis.hpp"
#include "kernels/latent/operators.hpp"
#include "kernels/latent/product.hpp"
#include "kernels/mask.hpp"
#include "kernels/partial.hpp"
#include "parallel/latent_parts.hpp"
#include "parallel/latent_prefill.hpp"
#include "parallel/latent_scores.hpp"
#include "parallel/plan.hpp"

namespace dattn {
namespace {

constexpr Index kRows = 512;  ///< tokens whose rows are made at a time

double square(View<const float> x, Index row, Range dims) {
  double sum = 0;
  for (Index d = dims.begin; d < dims.end; ++d) {
    sum += static_cast<double>(x.at(row, 0)[d]) * static_cast<double>(x.at(row, 0)[d]);
  }
  return sum;
}

}  // namespace

std::optional<std::string> complaint(const Slicing& slicing, const LatentSizes& sizes, int ranks) {
  const auto text = [](Index n) { return std::to_string(n); };
  if (slicing.slices < 1 || slicing.slices > sizes.kv_rank) {
    return "from 1 to kv_rank = " + text(sizes.kv_rank) + " slices, not " + text(slicing.slices);
  }
  if (ranks % slicing.slices != 0) {
    return text(slicing.slices) + " slices do not divide " + text(ranks) + " ranks; take a divisor";
  }
  const bool power = (sizes.kv_rank & (sizes.kv_rank - 1)) == 0;
  if (slicing.basis == Slicing::Basis::hadamard && !power) {
    return "a Hadamard basis wants a kv_rank that is a power of two, not " + text(sizes.kv_rank);
  }
  return std::nullopt;
}

std::vector<int> ranks_with_the_same_heads(int rank, int slices) {
  std::vector<int> all(static_cast<std::size_t>(slices));
  std::iota(all.begin(), all.end(), rank / slices * slices);
  return all;
}

Index summed_over_slices(const Slicing& slicing, const LatentSizes& sizes, const Decoding& decoding,
                         Index rows, Index heads) {
  const Index scores = slicing.exact ? most_scores(decoding, heads) : 0;
  return std::max(scores, rows * heads * sizes.d_v);
}

Index step_bytes(const Slicing& slicing, const LatentSizes& sizes, const Decoding& decoding,
                 Index rows, Index heads, int threads) {
  const Index latent = (sizes.kv_rank + slicing.slices - 1) / slicing.slices;
  const Index row = latent + sizes.d_rope;
  const Index number = bytes_of(Type::f4);
  // Queries before and behind W_UK, O, and the values.
  const Index all = rows * heads * (sizes.d_qk() + row + latent + sizes.d_v) * number;
  if (slicing.exact) {  // scores, and of each row and head the softmax so far
    return all + most_scores(decoding, heads) * number + rows * heads * 4 * number;
  }
  Shape shape = absorbed_shape(sizes, rows, decoding.keys(), latent);
  shape.query_heads = heads;
  const bool narrow = decoding.type == Type::bf16;
  return all + rows * heads * (row * bytes_of(decoding.type) + record_length(latent) * number) +
         attend_bytes(shape, rows, heads, decoding.keys(), threads,
                      narrow ? *chosen_isa().bf16 : *chosen_isa().f4);
}

LatentWeights in_basis(const LatentWeights& weights, const Slicing& slicing,
                       View<const float> calibration, const Work& work) {
  const Index rank = weights.sizes.kv_rank;
  switch (slicing.basis) {
    case Slicing::Basis::none:
      return folded(weights);
    case Slicing::Basis::hadamard:
      return rotated(weights, hadamard_basis(rank, 1));
    case Slicing::Basis::pca:
      break;
  }
  const LatentWeights flat = folded(weights);
  std::vector<float> rows(static_cast<std::size_t>(calibration.rows * weights.sizes.row()));
  const View<float> made{rows.data(), calibration.rows, 1, weights.sizes.row()};
  latent_rows(flat, calibration, {{0, calibration.rows, 1}}, made, work);
  return rotated(weights, pca_basis(latent_values(View<const float>(made), rank)));
}

template <comm::Transport T>
SlicedDecoder<T>::SlicedDecoder(const LatentSizes& sizes, const MakeWeights& weights,
                                const Decoding& decoding, const Slicing& slicing,
                                View<const float> calibration, T& transport, EngineOptions options,
                                Type weight_type, const Hosts& hosts)
    : transport_(transport),
      all_reduce_(transport, all_ranks(transport.size()), hosts, options.verify_wire),
      over_slices_(transport, ranks_with_the_same_heads(transport.rank(), slicing.slices), hosts,
                   options.verify_wire),
      decoding_(decoding),
      slicing_(slicing),
      work_(scaled({.threads = options.threads, .isa = options.isa, .workspace = &workspace_},
                   sizes)),
      sizes_(sizes) {
  const int parts = transport.size() / slicing.slices;
  const Range heads = even_part(sizes.heads, parts, transport.rank() / slicing.slices);
  const Range latent = even_part(sizes.kv_rank, slicing.slices, transport.rank() % slicing.slices);
  part_ = {heads, latent, {0, sizes.kv_rank}};
  const LatentWeights all = in_basis(weights(heads), slicing, calibration, work_);
  calibrate(all, calibration);
  const Range own = even_part(heads.size(), over_slices_.ranks(), over_slices_.transport().rank());
  own_ = {heads.begin + own.begin, heads.begin + own.end};
  weights_ = stored(slice(all, part_), weight_type);
  std::visit([](auto& w) { w.up_q = w.out = {}; }, weights_);
  outer_ = stored(slice(all, {own_, {0, 0}, {0, 0}}), weight_type);
  std::visit([](auto& w) { w.down_q = w.down_kv = {}; }, outer_);
  down_.emplace(weights_, all_reduce_);
  cache_ = Reserved(decoding.keys() * row() * bytes_of(decoding.type), true);
}

/// Fits the factors of this slice: its energy among that of latents, and its scores to the whole.
template <comm::Transport T>
void SlicedDecoder<T>::calibrate(const LatentWeights& all, View<const float> calibration) {
  const LatentSizes& sizes = all.sizes;
  const Range own = part_.latent;
  if (slicing_.exact || own.size() == sizes.kv_rank) return;
  CHECK(calibration.rows > 0);
  const Index count = calibration.rows;
  std::vector<float> numbers(static_cast<std::size_t>(count * sizes.row()));
  const View<float> rows{numbers.data(), count, 1, sizes.row()};
  latent_rows(all, calibration, {{0, count, 1}}, rows, work_);
  double whole_energy = 0;
  double own_energy = 0;
  for (Index n = 0; n < count; ++n) {
    whole_energy += square(rows, n, {0, sizes.kv_rank});
    own_energy += square(rows, n, own);
  }
  const double share = own_energy / whole_energy;
  rms_factor_ =
      std::sqrt(static_cast<double>(own.size()) / (share * static_cast<double>(sizes.kv_rank)));
  if (slicing_.factor == Slicing::Factor::energy) factor_ = 1 / share;
  if (slicing_.factor != Slicing::Factor::fitted || part_.heads.empty()) return;
  // Queries of some of the same tokens against all of them, without position.
  const Index asked = std::min<Index>(count, 16);
  const Range heads = part_.heads;
  const Index lanes = asked * heads.size();
  std::vector<float> q(static_cast<std::size_t>(lanes * sizes.row()));
  const View<const float> last{calibration.at(count - asked, 0), asked, 1, calibration.dim,
                               calibration.row_stride()};
  absorbed_queries<float>(all, heads, last, {{count - asked, asked, 1}},
                          {q.data(), asked, heads.size(), sizes.row()}, work_);
  std::vector<float> whole_scores(static_cast<std::size_t>(lanes * count));
  std::vector<float> own_scores(whole_scores.size());
  const auto product = [&](Range dims, std::vector<float>& scores) {
    return Product{.a = q.data() + dims.begin,
                   .a_stride = sizes.row(),
                   .b = rows.data + dims.begin,
                   .b_stride = sizes.row(),
                   .transposed = true,
                   .c = scores.data(),
                   .c_stride = count,
                   .rows = lanes,
                   .columns = count,
                   .inner = dims.size()};
  };
  const Product products[] = {product({0, sizes.kv_rank}, whole_scores), product(own, own_scores)};
  multiply(products, work_);
  double both = 0;
  double squares = 0;
  for (std::size_t i = 0; i < own_scores.size(); ++i) {
    const auto x = static_cast<double>(own_scores[i]);
    both += x * static_cast<double>(whole_scores[i]);
    squares += x * x;
  }
  if (squares > 0) factor_ = both / squares;
}

template <comm::Transport T>
std::byte* SlicedDecoder<T>::row_at(Index position) const {
  return cache_.get() + position * row() * bytes_of(decoding_.type);
}

template <comm::Transport T>
Index SlicedDecoder<T>::cache_bytes(std::span<const Index> lengths) const {
  return std::accumulate(lengths.begin(), lengths.end(), decoding_.shared()) * row() *
         bytes_of(decoding_.type);
}

template <comm::Transport T>
Ranges SlicedDecoder<T>::gets() const {
  if (part_.latent.begin > 0 || part_.heads.empty()) return {};
  return {part_.heads};
}

template <comm::Transport T>
void SlicedDecoder<T>::fill(std::span<const Index> lengths, const Hidden& hidden) {
  const Index model = sizes_.model;
  std::vector<float> x(static_cast<std::size_t>(kRows * model));
  std::vector<float> numbers(static_cast<std::size_t>(kRows * sizes_.row()));
  for (const Stretch& stretch : decoding_.stretches(lengths)) {
    for (int owner = 0; owner < transport_.size(); ++owner) {  // as a prefill makes them
      const Run theirs = own_positions(stretch.keys, transport_.size(), owner);
      for (Range some{0, 0}; some.end < theirs.count;) {
        some = {some.end, std::min(theirs.count, some.end + kRows)};
        const Run positions = theirs.part(some);
        const Run tokens = stretch.tokens(positions);
        hidden(stretch.sequence(), {tokens}, x.data());
        const View<float> c{numbers.data(), some.size(), 1, sizes_.row()};
        std::visit(
            [&](const auto& w) {
              latents(w, {x.data(), some.size(), 1, model}, c, work_);
            },
            weights_);
        write_any(positions, tokens, c);
      }
    }
  }
}

template <comm::Transport T>
HandOver SlicedDecoder<T>::take(std::span<const std::byte> rows, std::span<const Index> lengths) {
  const int ranks = transport_.size();
  const Index element = bytes_of(decoding_.type);
  const Index whole_row = sizes_.row() * element;
  const Index own_row = row() * element;
  const Index rope = sizes_.d_rope * element;
  std::vector<comm::ConstStrips> to(static_cast<std::size_t>(ranks));
  std::vector<comm::Strips> from(to.size());
  for (int peer = 0; peer < ranks; ++peer) {
    const Range cut = even_part(sizes_.kv_rank, slicing_.slices, peer % slicing_.slices);
    const std::byte* at = rows.data();
    for (const Stretch& stretch : decoding_.stretches(lengths)) {
      auto& sends = to[static_cast<std::size_t>(peer)];
      const Index count = own_positions(stretch.keys, ranks, transport_.rank()).count;
      if (count > 0) {
        sends.push_back({at + cut.begin * element, count, cut.size() * element, whole_row});
        sends.push_back({at + sizes_.kv_rank * element, count, rope, whole_row});
      }
      at += count * whole_row;
      auto& receives = from[static_cast<std::size_t>(peer)];
      const Run theirs = own_positions(stretch.keys, ranks, peer);
      if (theirs.count == 0) continue;
      std::byte* into = row_at(theirs.first);
      receives.push_back({into, theirs.count, own_row - rope, ranks * own_row});
      receives.push_back({into + own_row - rope, theirs.count, rope, ranks * own_row});
    }
  }
  return exchange(transport_, to, from, all_reduce_.hosts(),
                  SealedMessages<T>(transport_, "rows of the cache", all_reduce_.verifies()));
}

template <comm::Transport T>
void SlicedDecoder<T>::draw(std::span<const Index> lengths) {
  for (const Stretch& stretch : decoding_.stretches(lengths)) {
    std::byte* to = row_at(stretch.keys.begin);
    const Index count = stretch.keys.size() * row();
    const auto seed = static_cast<std::uint64_t>(stretch.keys.begin);
    decoding_.type == Type::bf16 ? draw_numbers(reinterpret_cast<BFloat16*>(to), count, seed)
                                 : draw_numbers(reinterpret_cast<float*>(to), count, seed);
  }
}

/// Writes the rows of the cache at these positions from latents before RMSNorm and keys before
/// RoPE; `tokens` are where they stand in a sequence.
template <comm::Transport T>
void SlicedDecoder<T>::write_any(const Run& positions, const Run& tokens, View<const float> c) {
  decoding_.type == Type::bf16 ? write<BFloat16>(positions, tokens, c)
                               : write<float>(positions, tokens, c);
}

template <comm::Transport T>
template <class E>
void SlicedDecoder<T>::write(const Run& positions, const Run& tokens, View<const float> c) {
  const LatentSizes& sizes = sizes_;
  std::vector<float> rms(static_cast<std::size_t>(c.rows));
  const bool of_slice = !slicing_.exact && slicing_.norm == Slicing::Norm::slice;
  const Range dims = of_slice ? part_.latent : Range{0, sizes.kv_rank};
  for (Index n = 0; n < c.rows; ++n) {
    const double factor = of_slice ? rms_factor_ : 1;
    const double mean = square(c, n, dims) / static_cast<double>(dims.size()) * factor * factor;
    rms[static_cast<std::size_t>(n)] = static_cast<float>(std::sqrt(mean + sizes.epsilon));
  }
  E* to = reinterpret_cast<E*>(row_at(positions.first));
  const View<E> rows{to, c.rows, 1, row(), positions.step * row()};
  std::visit([&](const auto& w) { cache_rows<E>(w, c, rms, {tokens}, rows); }, weights_);
}

/// Absorbed queries of the heads of this slice [tokens, heads, row]: each rank with the same heads
/// makes some of them, up to W_UQ.
template <comm::Transport T>
void SlicedDecoder<T>::make_queries(std::span<const Index> lengths, View<float> q,
                                    LatentTimes& times) {
  const Range heads = part_.heads;
  if (heads.empty()) return;
  const double start = seconds_now();
  const Index each = decoding_.queries;
  const Index d_qk = sizes_.d_qk();
  Runs positions;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    positions.push_back({decoding_.before(s) + lengths[s] - each, each, 1});
  }
  std::vector<float> numbers(static_cast<std::size_t>(q.rows * heads.size() * d_qk));
  const View<float> all{numbers.data(), q.rows, heads.size(), d_qk};
  const View<float> made = all.only({own_.begin - heads.begin, own_.end - heads.begin});
  std::visit(
      [&](const auto& w) { expanded_queries(w, own_, down_->queries(), positions, made, work_); },
      outer_);
  times.project += seconds_now() - start;
  std::vector<Range> parts;
  for (int r = 0; r < over_slices_.ranks(); ++r) {
    const Range part = even_part(heads.size(), over_slices_.ranks(), r);
    parts.push_back({part.begin * d_qk, part.end * d_qk});
  }
  gather_columns(over_slices_, {all.data, q.rows, 1, heads.size() * d_qk}, parts, times, "queries");
  const double gathered = seconds_now();
  std::visit([&](const auto& w) { absorb<float>(w, heads, View<const float>(all), q, work_); },
             weights_);
  times.project += seconds_now() - gathered;
}

/// Adds to y what becomes of O in the latent, [tokens, heads, latent], of the heads own_. A slice
/// has part of the values of all its heads, so they are added up first.
template <comm::Transport T>
void SlicedDecoder<T>::put_out(View<const float> o, View<float> y, LatentTimes& times) {
  const Range heads = part_.heads;
  if (heads.empty()) return;
  const double start = seconds_now();
  std::vector<float> numbers(static_cast<std::size_t>(o.rows * heads.size() * sizes_.d_v));
  const View<float> values{numbers.data(), o.rows, heads.size(), sizes_.d_v};
  std::visit([&](const auto& w) { up_values(w, heads, o, values, work_); }, weights_);
  times.project += seconds_now() - start;
  times.gather += add_up(over_slices_, numbers, times);
  const double summed = seconds_now();
  const View<const float> own = values.only({own_.begin - heads.begin, own_.end - heads.begin});
  std::visit([&](const auto& w) { project_out(w, own_, own, y, work_); }, outer_);
  times.project += seconds_now() - summed;
}

template <comm::Transport T>
LatentTimes SlicedDecoder<T>::step(std::span<const Index> lengths, View<const float> x,
                                   std::span<float> y) {
  const LatentSizes& sizes = sizes_;
  const Index each = decoding_.queries;
  CHECK(x.rows == each * static_cast<Index>(lengths.size()) && x.dim == sizes.model, x.rows, x.dim);
  CHECK(static_cast<Index>(y.size()) == x.rows * sizes.model, y.size());
  LatentTimes times;
  const double start = seconds_now();
  down_->make(x, work_, times);
  const double down = seconds_now();
  const View<const float> made = down_->latents();
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    CHECK(each <= lengths[s] && lengths[s] <= decoding_.capacity[s], s, lengths[s]);
    const Index fresh = lengths[s] - each;
    write_any({decoding_.first(s) + fresh, each, 1}, {decoding_.before(s) + fresh, each, 1},
              made.part({static_cast<Index>(s) * each, static_cast<Index>(s + 1) * each}));
  }
  times.project += seconds_now() - down;
  const Range heads = part_.heads;
  const Index latent = part_.latent.size();
  std::vector<float> o(static_cast<std::size_t>(x.rows * heads.size() * latent));
  const View<float> out{o.data(), x.rows, heads.size(), latent};
  std::vector<float> numbers(static_cast<std::size_t>(x.rows * heads.size() * row()));
  const View<float> q{numbers.data(), x.rows, heads.size(), row()};
  make_queries(lengths, q, times);
  decoding_.type == Type::bf16 ? attend<BFloat16>(lengths, q, out, times)
                               : attend<float>(lengths, q, out, times);
  std::fill(y.begin(), y.end(), 0.0F);
  put_out(out, {y.data(), x.rows, 1, sizes.model}, times);
  times.reduce = add_up(all_reduce_, y, times);
  times.seconds = seconds_now() - start;
  return times;
}

template <comm::Transport T>
template <class E>
void SlicedDecoder<T>::attend(std::span<const Index> lengths, View<const float> q, View<float> o,
                              LatentTimes& times) {
  const LatentSizes& sizes = sizes_;
  const Range heads = part_.heads;
  const Index each = decoding_.queries;
  const Index latent = part_.latent.size();
  const View<const E> rows{reinterpret_cast<const E*>(row_at(0)), decoding_.keys(), 1, row()};
  if (slicing_.exact) {
    std::vector<float> lse(static_cast<std::size_t>(q.rows * heads.size()));
    attend_by_sums<E>(over_slices_, decoding_, lengths, q, rows, o, lse, work_, times);
    lse_ = gets().empty() ? std::vector<float>{} : std::move(lse);
    return;
  }
  if (heads.empty()) return;
  const double from = seconds_now();
  std::vector<E> own(static_cast<std::size_t>(q.size()));
  for (std::size_t i = 0; i < own.size(); ++i) {
    const bool is_latent = static_cast<Index>(i) % row() < latent;
    own[i] = E(is_latent ? q.data[i] * static_cast<float>(factor_) : q.data[i]);
  }
  std::vector<float> records(static_cast<std::size_t>(q.rows * heads.size() * (latent + 2)));
  const View<float> sums{records.data(), q.rows, heads.size(), latent + 2};
  clear(sums);
  const View<const E> asking{own.data(), q.rows, heads.size(), row()};
  for (const Stretch& stretch : decoding_.stretches(lengths)) {
    if (stretch.keys.empty()) continue;
    // What is shared all see whole, and meet in one product; what is a sequence's own up to itself.
    const bool is_own = stretch.keys.begin >= decoding_.shared();
    const Range some = rows_of(stretch, each);
    Shape shape = absorbed_shape(sizes, some.size(), stretch.keys.size(), latent);
    shape.query_heads = heads.size();
    const Where where{shape,
                      {0, heads.size()},
                      {0, 1},
                      {0, 1},
                      {{is_own ? shape.first_query() : 0, some.size(), 1}},
                      {{0, shape.keys, 1}}};
    attend_latent<E>(asking.part(some), rows.part(stretch.keys), sums.part(some), where,
                     *parse_mask(is_own ? "causal" : "full", shape), work_);
  }
  std::vector<float> lse(static_cast<std::size_t>(q.rows * heads.size()));
  finish(View<const float>(sums), std::span(o.data, static_cast<std::size_t>(o.size())),
         std::span(lse));
  times.attention.compute += seconds_now() - from;
}

template class SlicedDecoder<comm::Communicator>;
template class SlicedDecoder<comm::Loopback::Endpoint>;

}  // namespace dattn
