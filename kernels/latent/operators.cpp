#include "kernels/latent/operators.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/check.hpp"
#include "kernels/latent/product.hpp"

namespace dattn {
namespace {

/// Rows that are widened or rounded at a time.
constexpr Index kRows = 512;

template <class T>
bool is(View<T> view, Index rows, Index heads, Index dim) {
  return view.rows == rows && view.heads == heads && view.dim == dim;
}

/// Heads `heads` counted from the first that the weights hold.
template <class W>
Range held(const LatentWeightsOf<W>& w, Range heads) {
  CHECK(w.part.heads.contains(heads) && heads.begin <= heads.end, heads.begin, heads.end,
        w.part.heads.begin, w.part.heads.end);
  return {heads.begin - w.part.heads.begin, heads.end - w.part.heads.begin};
}

/// The matrix that an operator reads is there: of the others a layer may have let go.
template <class W>
void check_matrix(const std::vector<W>& numbers, Index count) {
  CHECK(static_cast<Index>(numbers.size()) == count, numbers.size(), count);
}

}  // namespace

void rms_of(View<const float> x, double epsilon, std::span<float> rms) {
  CHECK(x.heads == 1 && static_cast<Index>(rms.size()) == x.rows, x.heads, x.rows, rms.size());
  for (Index row = 0; row < x.rows; ++row) {
    const float* from = x.at(row, 0);
    double sum = 0;
    for (Index i = 0; i < x.dim; ++i) {
      sum += static_cast<double>(from[i]) * static_cast<double>(from[i]);
    }
    rms[static_cast<std::size_t>(row)] =
        static_cast<float>(std::sqrt(sum / static_cast<double>(x.dim) + epsilon));
  }
}

void rms_norm(View<const float> x, std::span<const float> rms, std::span<const float> gamma,
              View<float> out) {
  CHECK(x.heads == 1 && is(out, x.rows, 1, x.dim), x.rows, x.dim, out.rows, out.dim);
  CHECK(static_cast<Index>(rms.size()) == x.rows, rms.size(), x.rows);
  CHECK(gamma.empty() || static_cast<Index>(gamma.size()) == x.dim, gamma.size(), x.dim);
  for (Index row = 0; row < x.rows; ++row) {
    const float* from = x.at(row, 0);
    float* to = out.at(row, 0);
    const float factor = 1 / rms[static_cast<std::size_t>(row)];
    for (Index i = 0; i < x.dim; ++i) {
      to[i] = from[i] * factor * (gamma.empty() ? 1.0f : gamma[static_cast<std::size_t>(i)]);
    }
  }
}

void rms_norm(View<const float> x, double epsilon, std::span<const float> gamma, View<float> out) {
  std::vector<float> rms(static_cast<std::size_t>(x.rows));
  rms_of(x, epsilon, rms);
  rms_norm(x, rms, gamma, out);
}

RopeAngles::RopeAngles(const LatentSizes& sizes, const Runs& positions) : pairs_(sizes.d_rope / 2) {
  const std::vector<double> frequencies = rope_frequencies(sizes);
  const double magnitude = rope_magnitude(sizes.rope);
  for (const Run& run : positions) {
    for (Index i = 0; i < run.count; ++i) {
      for (const double frequency : frequencies) {
        const double angle = static_cast<double>(run.at(i)) * frequency;
        cos_.push_back(static_cast<float>(magnitude * std::cos(angle)));
        sin_.push_back(static_cast<float>(magnitude * std::sin(angle)));
      }
    }
  }
}

void RopeAngles::turn(Index row, float* x) const {
  const float* c = cos_.data() + row * pairs_;
  const float* s = sin_.data() + row * pairs_;
  for (Index i = 0; i < pairs_; ++i) {
    const float re = x[2 * i];
    const float im = x[2 * i + 1];
    x[2 * i] = re * c[i] - im * s[i];
    x[2 * i + 1] = re * s[i] + im * c[i];
  }
}

template <class W>
void latents(const LatentWeightsOf<W>& w, View<const float> x, View<float> c, const Work& work) {
  check_matrix(w.down_kv, w.sizes.model * (w.part.columns.size() + w.sizes.d_rope));
  const Index width = w.part.columns.size() + w.sizes.d_rope;
  CHECK(is(x, x.rows, 1, w.sizes.model), x.heads, x.dim, w.sizes.model);
  CHECK(is(c, x.rows, 1, width), c.rows, c.heads, c.dim, width);
  const Product product{.a = x.data,
                        .a_stride = x.row_stride(),
                        .b = w.down_kv.data(),
                        .b_stride = width,
                        .c = c.data,
                        .c_stride = c.row_stride(),
                        .rows = x.rows,
                        .columns = width,
                        .inner = w.sizes.model};
  multiply({&product, 1}, work);
}

template <class T, class W>
void cache_rows(const LatentWeightsOf<W>& w, View<const float> c, std::span<const float> rms,
                const Runs& positions, View<T> rows) {
  const LatentPart& part = w.part;
  const Index columns = part.columns.size();
  const Index latent = part.latent.size();
  const Index skipped = part.latent.begin - part.columns.begin;
  CHECK(is(c, size(positions), 1, columns + w.sizes.d_rope), c.rows, c.dim, columns);
  CHECK(is(rows, c.rows, 1, latent + w.sizes.d_rope), rows.rows, rows.dim, latent);
  std::vector<float> own;
  if (rms.empty() && c.rows > 0) {
    CHECK(columns == w.sizes.kv_rank, columns, w.sizes.kv_rank);
    own.resize(static_cast<std::size_t>(c.rows));
    rms_of({c.data, c.rows, 1, columns, c.row_stride()}, w.sizes.epsilon, own);
    rms = own;
  }
  CHECK(static_cast<Index>(rms.size()) == c.rows, rms.size(), c.rows);
  const RopeAngles angles(w.sizes, positions);
  std::vector<float> key(static_cast<std::size_t>(w.sizes.d_rope));
  for (Index row = 0; row < c.rows; ++row) {
    const float* from = c.at(row, 0) + skipped;
    const float* gamma = w.kv_gamma.data() + skipped;
    const float factor = 1 / rms[static_cast<std::size_t>(row)];
    T* to = rows.at(row, 0);
    for (Index i = 0; i < latent; ++i) to[i] = static_cast<T>(from[i] * factor * gamma[i]);
    std::copy_n(c.at(row, 0) + columns, w.sizes.d_rope, key.begin());
    angles.turn(row, key.data());
    std::transform(key.begin(), key.end(), to + latent, [](float k) { return static_cast<T>(k); });
  }
}

template <class T, class W>
void latent_rows(const LatentWeightsOf<W>& w, View<const float> x, const Runs& positions,
                 View<T> rows, const Work& work) {
  const Index width = w.part.columns.size() + w.sizes.d_rope;
  const Buffer<float> c(x.rows * width);
  const View<float> view{c.get(), x.rows, 1, width};
  latents(w, x, view, work);
  cache_rows<T>(w, view, {}, positions, rows);
}

template <class W>
void compressed_queries(const LatentWeightsOf<W>& w, View<const float> x, View<float> c_q,
                        const Work& work) {
  check_matrix(w.down_q, w.sizes.model * w.sizes.q_rank);
  CHECK(is(x, x.rows, 1, w.sizes.model), x.heads, x.dim, w.sizes.model);
  CHECK(is(c_q, x.rows, 1, w.sizes.q_width()), c_q.rows, c_q.dim, w.sizes.q_width());
  if (w.sizes.q_rank == 0) {
    for (Index row = 0; row < x.rows; ++row) std::copy_n(x.at(row, 0), x.dim, c_q.at(row, 0));
    return;
  }
  const Product product{.a = x.data,
                        .a_stride = x.row_stride(),
                        .b = w.down_q.data(),
                        .b_stride = w.sizes.q_rank,
                        .c = c_q.data,
                        .c_stride = c_q.row_stride(),
                        .rows = x.rows,
                        .columns = w.sizes.q_rank,
                        .inner = w.sizes.model};
  multiply({&product, 1}, work);
  rms_norm(c_q, w.sizes.epsilon, w.q_gamma, c_q);
}

template <class W>
void expanded_queries(const LatentWeightsOf<W>& w, Range heads, View<const float> c_q,
                      const Runs& positions, View<float> q, const Work& work) {
  check_matrix(w.up_q, w.sizes.q_width() * w.part.heads.size() * w.sizes.d_qk());
  const LatentSizes& s = w.sizes;
  const Range mine = held(w, heads);
  CHECK(is(c_q, size(positions), 1, s.q_width()), c_q.rows, c_q.heads, c_q.dim, s.q_width());
  CHECK(is(q, c_q.rows, heads.size(), s.d_qk()), q.rows, q.heads, q.dim);
  const Product product{.a = c_q.data,
                        .a_stride = c_q.row_stride(),
                        .b = w.up_q.data() + mine.begin * s.d_qk(),
                        .b_stride = w.part.heads.size() * s.d_qk(),
                        .c = q.data,
                        .c_stride = q.row_stride(),
                        .rows = c_q.rows,
                        .columns = heads.size() * s.d_qk(),
                        .inner = s.q_width()};
  multiply({&product, 1}, work);
  const RopeAngles angles(s, positions);
  for (Index row = 0; row < q.rows; ++row) {
    for (Index h = 0; h < q.heads; ++h) angles.turn(row, q.at(row, h) + s.d_nope);
  }
}

namespace {

template <class W>
void absorb_float(const LatentWeightsOf<W>& w, Range heads, View<const float> q,
                  View<float> absorbed, const Work& work) {
  const LatentSizes& s = w.sizes;
  const Index latent = w.part.latent.size();
  std::vector<Product> products;
  for (Index h = 0; h < heads.size(); ++h) {
    products.push_back({.a = q.at(0, h),
                        .a_stride = q.row_stride(),
                        .b = w.up_k.data() + (held(w, heads).begin + h) * latent * s.d_nope,
                        .b_stride = s.d_nope,
                        .transposed = true,
                        .c = absorbed.at(0, h),
                        .c_stride = absorbed.row_stride(),
                        .rows = q.rows,
                        .columns = latent,
                        .inner = s.d_nope});
  }
  multiply(products, work);
  for (Index row = 0; row < q.rows; ++row) {
    for (Index h = 0; h < q.heads; ++h) {
      std::copy_n(q.at(row, h) + s.d_nope, s.d_rope, absorbed.at(row, h) + latent);
    }
  }
}

}  // namespace

template <class T, class W>
void absorb(const LatentWeightsOf<W>& w, Range heads, View<const float> q, View<T> absorbed,
            const Work& work) {
  check_matrix(w.up_k, w.part.heads.size() * w.part.latent.size() * w.sizes.d_nope);
  const Index dim = w.part.latent.size() + w.sizes.d_rope;
  CHECK(is(q, q.rows, heads.size(), w.sizes.d_qk()), q.rows, q.heads, q.dim);
  CHECK(is(absorbed, q.rows, heads.size(), dim), absorbed.rows, absorbed.heads, absorbed.dim);
  if constexpr (std::is_same_v<T, float>) {
    absorb_float(w, heads, q, absorbed, work);
  } else {
    const Index at_once = std::min(kRows, q.rows);
    const Buffer<float> wide(at_once * heads.size() * dim);
    for (Index row = 0; row < q.rows; row += at_once) {
      const Index count = std::min(at_once, q.rows - row);
      const View<float> part{wide.get(), count, heads.size(), dim};
      absorb_float(w, heads, {q.at(row, 0), count, q.heads, q.dim, q.row_stride()}, part, work);
      for (Index i = 0; i < count; ++i) {
        std::transform(part.at(i, 0), part.at(i, 0) + heads.size() * dim, absorbed.at(row + i, 0),
                       [](float number) { return static_cast<T>(number); });
      }
    }
  }
}

template <class T, class W>
void absorbed_queries(const LatentWeightsOf<W>& w, Range heads, View<const float> x,
                      const Runs& positions, View<T> absorbed, const Work& work) {
  const LatentSizes& s = w.sizes;
  const Buffer<float> q(x.rows * heads.size() * s.d_qk());
  const View<float> q_view{q.get(), x.rows, heads.size(), s.d_qk()};
  const Buffer<float> c_q(s.q_rank > 0 ? x.rows * s.q_rank : 0);
  View<const float> from = x;
  if (s.q_rank > 0) {
    const View<float> to{c_q.get(), x.rows, 1, s.q_rank};
    compressed_queries(w, x, to, work);
    from = to;
  }
  expanded_queries(w, heads, from, positions, q_view, work);
  absorb(w, heads, View<const float>(q_view), absorbed, work);
}

template <class T, class W>
void expand(const LatentWeightsOf<W>& w, Range heads, View<const T> rows, View<float> k,
            View<float> v, const Work& work) {
  check_matrix(w.up_k, w.part.heads.size() * w.sizes.kv_rank * w.sizes.d_nope);
  check_matrix(w.up_v, w.part.heads.size() * w.sizes.kv_rank * w.sizes.d_v);
  const LatentSizes& s = w.sizes;
  CHECK(w.part.latent.size() == s.kv_rank, w.part.latent.begin, w.part.latent.end);
  CHECK(is(rows, rows.rows, 1, s.row()), rows.heads, rows.dim);
  CHECK(is(k, rows.rows, heads.size(), s.d_qk()), k.rows, k.heads, k.dim);
  CHECK(is(v, rows.rows, heads.size(), s.d_v), v.rows, v.heads, v.dim);
  const Range mine = held(w, heads);
  const Index at_once = std::is_same_v<T, float> ? rows.rows : std::min(kRows, rows.rows);
  const Buffer<float> wide(std::is_same_v<T, float> ? 0 : at_once * s.row());
  for (Index first = 0; first < rows.rows; first += at_once) {
    const Index count = std::min(at_once, rows.rows - first);
    View<const float> part;
    if constexpr (std::is_same_v<T, float>) {
      part = rows;
    } else {
      for (Index i = 0; i < count; ++i) {
        std::transform(rows.at(first + i, 0), rows.at(first + i, 0) + s.row(),
                       wide.get() + i * s.row(), [](T x) { return static_cast<float>(x); });
      }
      part = {wide.get(), count, 1, s.row()};
    }
    std::vector<Product> products;
    for (Index h = 0; h < heads.size(); ++h) {
      const Product key{.a = part.data,
                        .a_stride = part.row_stride(),
                        .b = w.up_k.data() + (mine.begin + h) * s.kv_rank * s.d_nope,
                        .b_stride = s.d_nope,
                        .c = k.at(first, h),
                        .c_stride = k.row_stride(),
                        .rows = count,
                        .columns = s.d_nope,
                        .inner = s.kv_rank};
      Product value = key;
      value.b = w.up_v.data() + (mine.begin + h) * s.kv_rank * s.d_v;
      value.b_stride = value.columns = s.d_v;
      value.c = v.at(first, h);
      value.c_stride = v.row_stride();
      products.push_back(key);
      products.push_back(value);
    }
    multiply(products, work);
    for (Index i = 0; i < count; ++i) {
      for (Index h = 0; h < heads.size(); ++h) {
        std::copy_n(part.at(i, 0) + s.kv_rank, s.d_rope, k.at(first + i, h) + s.d_nope);
      }
    }
  }
}

template <class W>
void up_values(const LatentWeightsOf<W>& w, Range heads, View<const float> absorbed, View<float> o,
               const Work& work) {
  check_matrix(w.up_v, w.part.heads.size() * w.part.latent.size() * w.sizes.d_v);
  const Index latent = w.part.latent.size();
  const Range mine = held(w, heads);
  CHECK(is(absorbed, absorbed.rows, heads.size(), latent), absorbed.heads, absorbed.dim, latent);
  CHECK(is(o, absorbed.rows, heads.size(), w.sizes.d_v), o.rows, o.heads, o.dim);
  std::vector<Product> products;
  for (Index h = 0; h < heads.size(); ++h) {
    products.push_back({.a = absorbed.at(0, h),
                        .a_stride = absorbed.row_stride(),
                        .b = w.up_v.data() + (mine.begin + h) * latent * w.sizes.d_v,
                        .b_stride = w.sizes.d_v,
                        .c = o.at(0, h),
                        .c_stride = o.row_stride(),
                        .rows = absorbed.rows,
                        .columns = w.sizes.d_v,
                        .inner = latent});
  }
  multiply(products, work);
}

template <class W>
void project_out(const LatentWeightsOf<W>& w, Range heads, View<const float> o, View<float> y,
                 const Work& work) {
  check_matrix(w.out, w.part.heads.size() * w.sizes.d_v * w.sizes.model);
  const LatentSizes& s = w.sizes;
  CHECK(is(o, o.rows, heads.size(), s.d_v), o.heads, o.dim);
  CHECK(is(y, o.rows, 1, s.model), y.rows, y.heads, y.dim);
  const Range mine = held(w, heads);
  if (heads.empty()) return;
  const Product product{.a = o.data,
                        .a_stride = o.row_stride(),
                        .b = w.out.data() + mine.begin * s.d_v * s.model,
                        .b_stride = s.model,
                        .c = y.data,
                        .c_stride = y.row_stride(),
                        .rows = o.rows,
                        .columns = s.model,
                        .inner = heads.size() * s.d_v,
                        .add = true};
  multiply({&product, 1}, work);
}

template <class W>
void values_out(const LatentWeightsOf<W>& w, Range heads, View<const float> absorbed, View<float> y,
                const Work& work) {
  const Buffer<float> o(absorbed.rows * heads.size() * w.sizes.d_v);
  const View<float> view{o.get(), absorbed.rows, heads.size(), w.sizes.d_v};
  up_values(w, heads, absorbed, view, work);
  project_out(w, heads, view, y, work);
}

#define DATTN_OPERATORS(T, W)                                                                      \
  template void cache_rows(const LatentWeightsOf<W>&, View<const float>, std::span<const float>,   \
                           const Runs&, View<T>);                                                  \
  template void latent_rows(const LatentWeightsOf<W>&, View<const float>, const Runs&, View<T>,    \
                            const Work&);                                                          \
  template void absorb(const LatentWeightsOf<W>&, Range, View<const float>, View<T>, const Work&); \
  template void absorbed_queries(const LatentWeightsOf<W>&, Range, View<const float>, const Runs&, \
                                 View<T>, const Work&);                                            \
  template void expand(const LatentWeightsOf<W>&, Range, View<const T>, View<float>, View<float>,  \
                       const Work&);
DATTN_OPERATORS(float, float)
DATTN_OPERATORS(float, BFloat16)
DATTN_OPERATORS(BFloat16, float)
DATTN_OPERATORS(BFloat16, BFloat16)
#undef DATTN_OPERATORS

#define DATTN_OPERATORS(W)                                                                         \
  template void latents(const LatentWeightsOf<W>&, View<const float>, View<float>, const Work&);   \
  template void compressed_queries(const LatentWeightsOf<W>&, View<const float>, View<float>,      \
                                   const Work&);                                                   \
  template void expanded_queries(const LatentWeightsOf<W>&, Range, View<const float>, const Runs&, \
                                 View<float>, const Work&);                                        \
  template void up_values(const LatentWeightsOf<W>&, Range, View<const float>, View<float>,        \
                          const Work&);                                                            \
  template void project_out(const LatentWeightsOf<W>&, Range, View<const float>, View<float>,      \
                            const Work&);                                                          \
  template void values_out(const LatentWeightsOf<W>&, Range, View<const float>, View<float>,       \
                           const Work&);
DATTN_OPERATORS(float)
DATTN_OPERATORS(BFloat16)
#undef DATTN_OPERATORS

}  // namespace dattn
