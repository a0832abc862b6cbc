#include "kernels/latent/weights.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/check.hpp"
#include "kernels/random.hpp"

namespace dattn {
namespace {

/// Part of a matrix [outer, rows, columns] of which somebody holds the box of three Ranges.
struct Box {
  Range outer, rows, columns;
  Index size() const { return outer.size() * rows.size() * columns.size(); }
};

/// Calls at(place in the whole, number of the row in the box) for each row of a box.
template <class At>
void each_row(const Box& box, Index whole_rows, Index whole_columns, int threads, const At& at) {
#pragma omp parallel for num_threads(threads) collapse(2)
  for (Index o = box.outer.begin; o < box.outer.end; ++o) {
    for (Index r = box.rows.begin; r < box.rows.end; ++r) {
      at((o * whole_rows + r) * whole_columns + box.columns.begin,
         (o - box.outer.begin) * box.rows.size() + r - box.rows.begin);
    }
  }
}

/// Streams of numbers: one for each matrix of the definitions.
enum class Name : std::uint64_t { dq, q_gamma, uq, qr, dkv, kv_gamma, kr, uk, uv, o, count };

/// Where numbers of the matrix `name` go: `box` of the whole [.., rows, columns] into rows of
/// `stride` numbers of `to`, beside what else is in them.
struct Maker {
  std::int64_t seed;
  int threads;

  void fill(Name name, const Box& box, Index rows, Index columns, double mean, double deviation,
            float* to, Index stride) const {
    const std::uint64_t stream =
        mixed(mixed(static_cast<std::uint64_t>(seed)) + static_cast<std::uint64_t>(name));
    each_row(box, rows, columns, threads, [&](Index whole, Index number) {
      float* row = to + number * stride;
      for (Index i = 0; i < box.columns.size(); ++i) {
        row[i] = static_cast<float>(
            mean + deviation * normal(stream, static_cast<std::uint64_t>(whole + i)));
      }
    });
  }
};

std::vector<float> numbers(Index count) {
  return std::vector<float>(static_cast<std::size_t>(count));
}

/// `box` of `from`, which is [.., rows, columns].
std::vector<float> cut(const std::vector<float>& from, const Box& box, Index rows, Index columns) {
  std::vector<float> out = numbers(box.size());
  each_row(box, rows, columns, 1, [&](Index whole, Index number) {
    std::copy_n(from.begin() + whole, box.columns.size(),
                out.begin() + number * box.columns.size());
  });
  return out;
}

Range moved(Range range, Index by) { return {range.begin - by, range.end - by}; }

void check_part(const LatentSizes& sizes, const LatentPart& part) {
  const LatentPart all = whole(sizes);
  CHECK(all.heads.contains(part.heads), part.heads.begin, part.heads.end, sizes.heads);
  CHECK(all.columns.contains(part.columns), part.columns.begin, part.columns.end, sizes.kv_rank);
  CHECK(part.columns.contains(part.latent), part.latent.begin, part.latent.end);
}

}  // namespace

LatentPart whole(const LatentSizes& sizes) {
  return {{0, sizes.heads}, {0, sizes.kv_rank}, {0, sizes.kv_rank}};
}

LatentWeights random_weights(const LatentSizes& sizes, const LatentPart& part, std::int64_t seed,
                             int threads) {
  const auto why = complaint(sizes);
  CHECK(!why, why.value_or(""));
  check_part(sizes, part);
  const Maker maker{seed, threads};
  const auto one_over = [](Index inputs) { return 1 / std::sqrt(static_cast<double>(inputs)); };
  const Range one{0, 1};
  const Range model{0, sizes.model};
  const Range q_rank{0, sizes.q_rank};
  const Range q_width{0, sizes.q_width()};
  const Index heads = part.heads.size();
  LatentWeights w{.sizes = sizes, .part = part};
  if (sizes.q_rank > 0) {
    w.down_q = numbers(sizes.model * sizes.q_rank);
    maker.fill(Name::dq, {one, model, q_rank}, sizes.model, sizes.q_rank, 0, one_over(sizes.model),
               w.down_q.data(), sizes.q_rank);
    w.q_gamma = numbers(sizes.q_rank);
    maker.fill(Name::q_gamma, {one, one, q_rank}, 1, sizes.q_rank, 1, 0.1, w.q_gamma.data(), 0);
  }
  // A row for each (input, head): W_UQ, then W_QR.
  w.up_q = numbers(q_width.size() * heads * sizes.d_qk());
  maker.fill(Name::uq, {q_width, part.heads, {0, sizes.d_nope}}, sizes.heads, sizes.d_nope, 0,
             one_over(sizes.q_width()), w.up_q.data(), sizes.d_qk());
  maker.fill(Name::qr, {q_width, part.heads, {0, sizes.d_rope}}, sizes.heads, sizes.d_rope, 0,
             one_over(sizes.q_width()), w.up_q.data() + sizes.d_nope, sizes.d_qk());
  const Index kv_width = part.columns.size() + sizes.d_rope;
  w.down_kv = numbers(sizes.model * kv_width);
  maker.fill(Name::dkv, {one, model, part.columns}, sizes.model, sizes.kv_rank, 0,
             one_over(sizes.model), w.down_kv.data(), kv_width);
  maker.fill(Name::kr, {one, model, {0, sizes.d_rope}}, sizes.model, sizes.d_rope, 0,
             one_over(sizes.model), w.down_kv.data() + part.columns.size(), kv_width);
  w.kv_gamma = numbers(part.columns.size());
  maker.fill(Name::kv_gamma, {one, one, part.columns}, 1, sizes.kv_rank, 1, 0.1, w.kv_gamma.data(),
             0);
  w.up_k = numbers(heads * part.latent.size() * sizes.d_nope);
  maker.fill(Name::uk, {part.heads, part.latent, {0, sizes.d_nope}}, sizes.kv_rank, sizes.d_nope, 0,
             one_over(sizes.kv_rank), w.up_k.data(), sizes.d_nope);
  w.up_v = numbers(heads * part.latent.size() * sizes.d_v);
  maker.fill(Name::uv, {part.heads, part.latent, {0, sizes.d_v}}, sizes.kv_rank, sizes.d_v, 0,
             one_over(sizes.kv_rank), w.up_v.data(), sizes.d_v);
  w.out = numbers(heads * sizes.d_v * sizes.model);
  maker.fill(Name::o, {part.heads, {0, sizes.d_v}, model}, sizes.d_v, sizes.model, 0,
             one_over(sizes.heads * sizes.d_v), w.out.data(), sizes.model);
  return w;
}

LatentWeights slice(const LatentWeights& weights, const LatentPart& part) {
  check_weights(weights);
  const LatentSizes& sizes = weights.sizes;
  const LatentPart& have = weights.part;
  check_part(sizes, part);
  CHECK(have.heads.contains(part.heads) && have.latent.contains(part.latent) &&
            have.columns.contains(part.columns),
        part.heads.begin, part.latent.begin, part.columns.begin);
  const Range heads = moved(part.heads, have.heads.begin);
  const Range latent = moved(part.latent, have.latent.begin);
  const Range columns = moved(part.columns, have.columns.begin);
  const Range model{0, sizes.model};
  LatentWeights w{
      .sizes = sizes, .part = part, .down_q = weights.down_q, .q_gamma = weights.q_gamma};
  w.up_q = cut(weights.up_q, {{0, sizes.q_width()}, heads, {0, sizes.d_qk()}}, have.heads.size(),
               sizes.d_qk());
  const Index kv_width = have.columns.size() + sizes.d_rope;
  w.down_kv = numbers(sizes.model * (part.columns.size() + sizes.d_rope));
  auto to = w.down_kv.begin();
  for (Index row = 0; row < sizes.model; ++row) {
    const auto from = weights.down_kv.begin() + row * kv_width;
    to = std::copy_n(from + columns.begin, columns.size(), to);
    to = std::copy_n(from + have.columns.size(), sizes.d_rope, to);
  }
  w.kv_gamma = cut(weights.kv_gamma, {{0, 1}, {0, 1}, columns}, 1, have.columns.size());
  w.up_k = cut(weights.up_k, {heads, latent, {0, sizes.d_nope}}, have.latent.size(), sizes.d_nope);
  w.up_v = cut(weights.up_v, {heads, latent, {0, sizes.d_v}}, have.latent.size(), sizes.d_v);
  w.out = cut(weights.out, {heads, {0, sizes.d_v}, model}, sizes.d_v, sizes.model);
  return w;
}

namespace {

/// Calls each(matrix of a, the same of b) for the matrices that may be bfloat16.
template <class A, class B, class Each>
void each_matrix(A& a, B& b, const Each& each) {
  each(a.down_q, b.down_q);
  each(a.up_q, b.up_q);
  each(a.down_kv, b.down_kv);
  each(a.up_k, b.up_k);
  each(a.up_v, b.up_v);
  each(a.out, b.out);
}

}  // namespace

LatentWeightsOf<BFloat16> narrowed(LatentWeights w) {
  check_weights(w);
  LatentWeightsOf<BFloat16> out{.sizes = w.sizes, .part = w.part};
  out.q_gamma = std::move(w.q_gamma);
  out.kv_gamma = std::move(w.kv_gamma);
  each_matrix(w, out, [](std::vector<float>& from, std::vector<BFloat16>& to) {
    to.resize(from.size());
    std::transform(from.begin(), from.end(), to.begin(), [](float x) { return BFloat16(x); });
    from = {};
  });
  return out;
}

void round_to_bfloat16(LatentWeights& weights) {
  each_matrix(weights, weights, [](std::vector<float>& numbers, std::vector<float>&) {
    for (float& x : numbers) x = static_cast<float>(BFloat16(x));
  });
}

template <class E>
void check_weights(const LatentWeightsOf<E>& w) {
  const LatentSizes& s = w.sizes;
  check_part(s, w.part);
  const Index heads = w.part.heads.size();
  const Index latent = w.part.latent.size();
  const Index columns = w.part.columns.size();
  const auto has = [](const auto& numbers, Index count) {
    return static_cast<Index>(numbers.size()) == count;
  };
  CHECK(has(w.down_q, s.model * s.q_rank) && has(w.q_gamma, s.q_rank), w.down_q.size(), s.q_rank);
  CHECK(has(w.up_q, s.q_width() * heads * s.d_qk()), w.up_q.size(), heads);
  CHECK(has(w.down_kv, s.model * (columns + s.d_rope)), w.down_kv.size(), columns);
  CHECK(has(w.kv_gamma, columns), w.kv_gamma.size(), columns);
  CHECK(has(w.up_k, heads * latent * s.d_nope), w.up_k.size(), heads, latent);
  CHECK(has(w.up_v, heads * latent * s.d_v), w.up_v.size(), heads, latent);
  CHECK(has(w.out, heads * s.d_v * s.model), w.out.size(), heads);
}

template void check_weights(const LatentWeights&);
template void check_weights(const LatentWeightsOf<BFloat16>&);

}  // namespace dattn
