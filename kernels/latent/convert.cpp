#include "kernels/latent/convert.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "kernels/check.hpp"
#include "kernels/latent/dense.hpp"

namespace dattn {
namespace {

constexpr double kNoNorm = 0x1p60;  // epsilon of an RMSNorm that divides by 2^30 whatever comes
constexpr float kNoNormGamma = 0x1p30F;  // and so gives back what it got

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

std::vector<double> in_double(const std::vector<float>& from) { return {from.begin(), from.end()}; }

std::vector<double> in_double(View<const float> x) {
  std::vector<double> out;
  for (Index n = 0; n < x.rows; ++n) out.insert(out.end(), x.at(n, 0), x.at(n, 0) + x.dim);
  return out;
}

void check_calibration(const GqaWeights& w, View<const float> x) {
  CHECK(x.heads == 1 && x.dim == w.sizes.model, x.heads, x.dim, w.sizes.model);
  if (x.rows == 0)
    throw std::invalid_argument("converting wants calibration tokens; there are none");
}

void require_finite(const std::vector<double>& numbers) {
  if (std::all_of(numbers.begin(), numbers.end(), [](double n) { return std::isfinite(n); }))
    return;
  throw std::invalid_argument(
      "weights and calibration tokens must be finite, and so must their products");
}

/// Where a component lies, and what it is made of: rows [first, first + fold) of the numbers of
/// each key head.
struct Components {
  const GqaSizes& sizes;
  const MergedKeys& keys;

  Index groups() const { return sizes.dim / 2 / keys.fold; }
  Index in_group() const { return sizes.kv_heads * keys.fold; }
  /// Of key head j and frequency f of the group in component m.
  double share(Index group, Index j, Index f, Index m) const {
    return keys.u[at((group * in_group() + j * keys.fold + f) * in_group() + m)];
  }
  /// Where component m of a group begins among numbers of d_rope (turning ones) or among those that
  /// stand.
  Index place(Index group, Index m) const {
    if (m >= keys.turning) {
      return 2 * (group * (in_group() - keys.turning) + m - keys.turning);
    }
    const Index in_copy = sizes.dim / 2 / keys.spacing;
    return 2 * (keys.copy_of(m) * in_copy + keys.pair_of(group, m));
  }
  Index turning_numbers() const { return 2 * groups() * keys.turning; }
  Index standing_numbers() const { return 2 * groups() * (in_group() - keys.turning); }
};

/// Component m of a group in each row of what has [rows, heads, dim] numbers, of head `from(j)` for
/// key head j (none if negative), times `factor`: to(row, re, im).
template <class From, class To>
void component(const Components& c, Index group, Index m, const std::vector<float>& numbers,
               Index heads, const From& from, const To& to) {
  const Index fold = c.keys.fold;
  const Index dim = c.sizes.dim;
  const Index rows = std::ssize(numbers) / (heads * dim);
  for (Index row = 0; row < rows; ++row) {
    double re = 0;
    double im = 0;
    for (Index j = 0; j < c.sizes.kv_heads; ++j) {
      if (from(j) < 0) continue;
      const float* pair = numbers.data() + (row * heads + from(j)) * dim + 2 * group * fold;
      for (Index f = 0; f < fold; ++f) {
        const double share = c.share(group, j, f, m);
        re += share * static_cast<double>(pair[2 * f]);
        im += share * static_cast<double>(pair[2 * f + 1]);
      }
    }
    to(row, re, im);
  }
}

/// W_K in another basis: [model, numbers that turn] and [model, numbers that stand].
struct SplitKeys {
  std::vector<double> turning, standing;
};

SplitKeys split_keys(const GqaWeights& w, const Components& c) {
  const Index turning = c.turning_numbers();
  const Index standing = c.standing_numbers();
  SplitKeys out{std::vector<double>(at(w.sizes.model * turning)),
                std::vector<double>(at(w.sizes.model * standing))};
  for (Index g = 0; g < c.groups(); ++g) {
    for (Index m = 0; m < c.in_group(); ++m) {
      const bool turns = m < c.keys.turning;
      std::vector<double>& to = turns ? out.turning : out.standing;
      const Index width = turns ? turning : standing;
      component(
          c, g, m, w.k, w.sizes.kv_heads, [](Index j) { return j; },
          [&](Index row, double re, double im) {
            to[at(row * width + c.place(g, m))] = re;
            to[at(row * width + c.place(g, m) + 1)] = im;
          });
    }
  }
  return out;
}

/// Columns [first, first + count) of a row-major matrix of `width` columns.
std::vector<double> columns_of(const std::vector<double>& from, Index width, Index first,
                               Index count) {
  std::vector<double> out;
  out.reserve(at(std::ssize(from) / width * count));
  for (auto row = from.begin(); row != from.end(); row += width) {
    out.insert(out.end(), row + first, row + first + count);
  }
  return out;
}

double norm(const std::vector<double>& numbers) {
  return std::sqrt(std::inner_product(numbers.begin(), numbers.end(), numbers.begin(), 0.0));
}

/// The mean of the Euclidean norms of columns [first, last) of what has this Gram matrix.
double mean_norm(const std::vector<double>& gram, Index width, Index first, Index last) {
  double sum = 0;
  for (Index i = first; i < last; ++i) sum += std::sqrt(gram[at(i * width + i)]);
  return sum / static_cast<double>(last - first);
}

}  // namespace

Index fold_of(const GqaSizes& s, const Conversion& c) {
  return c.fold > 0 ? c.fold : std::max<Index>(1, s.dim / c.d_rope);
}

std::optional<std::string> complaint(const GqaSizes& s, const Conversion& c) {
  if (const auto why = complaint(s)) return why;
  const Index keys = s.kv_heads * s.dim;
  const auto number = [](Index n) { return std::to_string(n); };
  const bool divides = c.d_rope >= 2 && c.d_rope % 2 == 0 && s.dim % c.d_rope == 0;
  const bool multiple = c.d_rope >= s.dim && c.d_rope % s.dim == 0 && c.d_rope <= keys;
  if (!divides && !multiple) {
    return "d_rope is " + number(c.d_rope) + "; want an even divisor of the head's dim " +
           number(s.dim) + ", or a multiple of it up to all keys, " + number(keys);
  }
  const Index spacing = std::max<Index>(1, s.dim / c.d_rope);
  if (c.fold < 0 || (s.dim / 2) % fold_of(s, c) != 0 || fold_of(s, c) % spacing != 0) {
    return "the fold of frequencies is " + number(c.fold) + "; want a divisor of the " +
           number(s.dim / 2) + " pairs of a head that is a multiple of " + number(spacing) +
           " (0: " + number(spacing) + ")";
  }
  if (c.kv_rank < 1 || c.kv_rank > 2 * keys - c.d_rope) {
    return "the kv rank is " + number(c.kv_rank) + "; want 1 to " + number(2 * keys - c.d_rope) +
           ": no more is left of keys and values beside d_rope " + number(c.d_rope);
  }
  if (!std::isfinite(c.balance) || c.balance <= 0) return "the balance must be above 0";
  return complaint(converted_sizes(s, c));
}

LatentSizes converted_sizes(const GqaSizes& s, const Conversion& c) {
  return {.model = s.model,
          .heads = s.heads,
          .kv_rank = c.kv_rank,
          .d_nope = c.d_rope == s.kv_heads * s.dim ? 1 : s.dim,
          .d_rope = c.d_rope,
          .d_v = s.dim,
          .rope = {.base = s.rope_base, .copies = std::max<Index>(1, c.d_rope / s.dim)},
          .epsilon = kNoNorm};
}

MergedKeys merged_keys(const GqaSizes& s) {
  MergedKeys keys{.copies = s.kv_heads, .turning = s.kv_heads};
  keys.u.resize(at(s.dim / 2 * s.kv_heads * s.kv_heads));
  for (Index g = 0; g < s.dim / 2; ++g) {
    for (Index j = 0; j < s.kv_heads; ++j) keys.u[at((g * s.kv_heads + j) * s.kv_heads + j)] = 1;
  }
  return keys;
}

MergedKeys concentrated_keys(const GqaWeights& weights, View<const float> x, Index fold) {
  check_weights(weights);
  check_calibration(weights, x);
  const GqaWeights w = with_neighbours(weights);
  const GqaSizes& s = w.sizes;
  CHECK(fold >= 1 && s.dim / 2 % fold == 0, fold, s.dim);
  const std::vector<double> k =
      times(in_double(x), in_double(w.k), x.rows, s.model, s.kv_heads * s.dim);
  require_finite(k);
  const Index in_group = s.kv_heads * fold;
  MergedKeys keys{.fold = fold, .copies = s.kv_heads, .turning = in_group};
  std::vector<double> samples(at(2 * x.rows * in_group));  // real parts, then imaginary ones
  for (Index g = 0; g < s.dim / 2 / fold; ++g) {
    auto to = samples.begin();
    for (Index part = 0; part < 2; ++part) {
      for (Index n = 0; n < x.rows; ++n) {
        for (Index j = 0; j < s.kv_heads; ++j) {
          for (Index f = 0; f < fold; ++f) {
            *to++ = k[at((n * s.kv_heads + j) * s.dim + 2 * (g * fold + f) + part)];
          }
        }
      }
    }
    const std::vector<double> u = eigenvectors(gram(samples, 2 * x.rows, in_group), in_group);
    keys.u.insert(keys.u.end(), u.begin(), u.end());
  }
  return keys;
}

MergedKeys cut_keys(const GqaSizes& s, MergedKeys keys, const Conversion& c) {
  CHECK(!complaint(s, c) && keys.fold == fold_of(s, c), keys.fold, c.fold);
  keys.spacing = std::max<Index>(1, s.dim / c.d_rope);
  keys.copies = std::max<Index>(1, c.d_rope / s.dim);
  keys.turning = keys.fold * keys.copies / keys.spacing;
  return keys;
}

std::vector<double> merged_reference(const GqaWeights& weights, const MergedKeys& keys,
                                     View<const float> x, Index queries) {
  check_weights(weights);
  CHECK(x.heads == 1 && x.dim == weights.sizes.model && queries <= x.rows, x.rows, queries);
  const GqaWeights w = with_neighbours(weights);
  const GqaSizes& s = w.sizes;
  const Components c{s, keys};
  const Index turning = c.turning_numbers();
  const Index standing = c.standing_numbers();
  const std::vector<double> from = in_double(x);
  const SplitKeys split = split_keys(w, c);
  std::vector<double> k_turn = times(from, split.turning, x.rows, s.model, turning);
  const std::vector<double> k_stand = times(from, split.standing, x.rows, s.model, standing);
  const std::vector<double> v = times(from, in_double(w.v), x.rows, s.model, s.kv_heads * s.dim);
  const auto turn = [&](Index position, double* numbers) {
    const Index in_copy = s.dim / 2 / keys.spacing;
    for (Index i = 0; i < turning / 2; ++i) {
      const double angle =
          static_cast<double>(position) *
          std::pow(s.rope_base, -static_cast<double>(i % in_copy) / static_cast<double>(in_copy));
      const double re = numbers[2 * i];
      const double im = numbers[2 * i + 1];
      numbers[2 * i] = re * std::cos(angle) - im * std::sin(angle);
      numbers[2 * i + 1] = re * std::sin(angle) + im * std::cos(angle);
    }
  };
  for (Index n = 0; n < x.rows; ++n) turn(n, k_turn.data() + n * turning);

  // Queries of the tokens that ask, as floats of the layer would be: [queries, heads, dim].
  const std::vector<double> last(from.end() - queries * s.model, from.end());
  const std::vector<double> q = times(last, in_double(w.q), queries, s.model, s.heads * s.dim);
  std::vector<double> o(at(queries * s.heads * s.dim));
  std::vector<double> q_turn(at(turning));
  std::vector<double> q_stand(at(standing));
  for (Index i = 0; i < queries; ++i) {
    const Index position = x.rows - queries + i;
    for (Index h = 0; h < s.heads; ++h) {
      const Index j = h / (s.heads / s.kv_heads);
      for (Index g = 0; g < c.groups(); ++g) {
        for (Index m = 0; m < c.in_group(); ++m) {
          double* to = (m < keys.turning ? q_turn : q_stand).data() + c.place(g, m);
          to[0] = to[1] = 0;
          for (Index f = 0; f < keys.fold; ++f) {
            const double* pair = q.data() + (i * s.heads + h) * s.dim + 2 * (g * keys.fold + f);
            to[0] += c.share(g, j, f, m) * pair[0];
            to[1] += c.share(g, j, f, m) * pair[1];
          }
        }
      }
      turn(position, q_turn.data());
      std::vector<double> weight;
      for (Index n = 0; n <= position; ++n) {
        double score = 0;
        for (Index d = 0; d < turning; ++d) score += q_turn[at(d)] * k_turn[at(n * turning + d)];
        for (Index d = 0; d < standing; ++d)
          score += q_stand[at(d)] * k_stand[at(n * standing + d)];
        weight.push_back(score / std::sqrt(static_cast<double>(s.dim)));
      }
      const double top = *std::max_element(weight.begin(), weight.end());
      double sum = 0;
      for (double& score : weight) sum += score = std::exp(score - top);
      for (std::size_t n = 0; n < weight.size(); ++n) {
        const double* value = v.data() + (static_cast<Index>(n) * s.kv_heads + j) * s.dim;
        double* to = o.data() + (i * s.heads + h) * s.dim;
        for (Index d = 0; d < s.dim; ++d) to[d] += weight[n] / sum * value[d];
      }
    }
  }
  return times(o, in_double(w.out), queries, s.heads * s.dim, s.model);
}

LatentWeights absorbed_weights(const GqaWeights& weights, const MergedKeys& cut,
                               const Conversion& conversion, View<const float> x) {
  check_weights(weights);
  check_calibration(weights, x);
  const GqaWeights w = with_neighbours(weights);
  const GqaSizes& s = w.sizes;
  const Components c{s, cut};
  const LatentSizes sizes = converted_sizes(s, conversion);
  CHECK(c.turning_numbers() == sizes.d_rope, c.turning_numbers(), sizes.d_rope);
  const Index standing = c.standing_numbers();
  const Index values = s.kv_heads * s.dim;
  const Index width = standing + values;
  const Index rank = sizes.kv_rank;
  const SplitKeys split = split_keys(w, c);

  // Keys that stand beside values, [model, width]; scaled, their PCA in place of themselves.
  std::vector<double> both(at(s.model * width));
  for (Index row = 0; row < s.model; ++row) {
    std::copy_n(split.standing.begin() + row * standing, standing, both.begin() + row * width);
    std::copy_n(w.v.begin() + row * values, values, both.begin() + row * width + standing);
  }
  const std::vector<double> sample = times(in_double(x), both, x.rows, s.model, width);
  require_finite(sample);
  std::vector<double> covariance = gram(sample, x.rows, width);
  double ratio = 1;
  if (standing > 0) {
    const double of_values = conversion.balance * mean_norm(covariance, width, standing, width);
    const double of_keys = mean_norm(covariance, width, 0, standing);
    // Keys that are but the rounding of float weights must not be blown up to the values' size.
    const bool rounding = norm(split.standing) <= 1e-6 * norm(split.turning);
    if (!rounding && of_keys > 0 && of_values > 0) ratio = of_keys / of_values;
  }
  for (Index i = 0; i < width; ++i) {
    for (Index j = 0; j < width; ++j) {
      covariance[at(i * width + j)] /= (i < standing ? ratio : 1) * (j < standing ? ratio : 1);
    }
    for (Index row = 0; i < standing && row < s.model; ++row) both[at(row * width + i)] /= ratio;
  }
  const std::vector<double> basis =
      columns_of(eigenvectors(std::move(covariance), width), width, 0, rank);
  const std::vector<double> down = times(both, basis, s.model, width, rank);

  LatentWeights out{.sizes = sizes, .part = whole(sizes)};
  for (Index row = 0; row < s.model; ++row) {
    const auto key = split.turning.begin() + row * sizes.d_rope;
    out.down_kv.insert(out.down_kv.end(), down.begin() + row * rank,
                       down.begin() + (row + 1) * rank);
    out.down_kv.insert(out.down_kv.end(), key, key + sizes.d_rope);
  }
  out.kv_gamma.assign(at(rank), kNoNormGamma);

  // Queries: as they are for keys that stand (up_k knows these), in components for those that turn.
  const double factor =
      std::sqrt(static_cast<double>(sizes.d_qk())) / std::sqrt(static_cast<double>(s.dim));
  const Index head_width = s.heads * sizes.d_qk();
  out.up_q.resize(at(s.model * head_width));
  for (Index h = 0; h < s.heads; ++h) {
    const Index key_head = h / (s.heads / s.kv_heads);
    const Index first = h * sizes.d_qk();
    for (Index row = 0; standing > 0 && row < s.model; ++row) {
      for (Index d = 0; d < s.dim; ++d) {
        out.up_q[at(row * head_width + first + d)] = static_cast<float>(
            factor * static_cast<double>(w.q[at((row * s.heads + h) * s.dim + d)]));
      }
    }
    for (Index g = 0; g < c.groups(); ++g) {
      for (Index m = 0; m < cut.turning; ++m) {
        const Index place = first + sizes.d_nope + c.place(g, m);
        component(
            c, g, m, w.q, s.heads, [&](Index j) { return j == key_head ? h : -1; },
            [&](Index row, double re, double im) {
              out.up_q[at(row * head_width + place)] = static_cast<float>(factor * re);
              out.up_q[at(row * head_width + place + 1)] = static_cast<float>(factor * im);
            });
      }
    }
  }

  // What a key head reads of the latent; query heads of one group have the same.
  for (Index h = 0; h < s.heads; ++h) {
    const Index j = h / (s.heads / s.kv_heads);
    std::vector<double> up_k(at(rank * sizes.d_nope));
    for (Index g = 0; g < c.groups(); ++g) {
      for (Index m = cut.turning; m < c.in_group(); ++m) {
        for (Index f = 0; f < cut.fold; ++f) {
          const double share = ratio * c.share(g, j, f, m);
          for (Index part = 0; part < 2; ++part) {
            const double* row = basis.data() + (c.place(g, m) + part) * rank;
            double* to = up_k.data() + 2 * (g * cut.fold + f) + part;
            for (Index r = 0; r < rank; ++r) to[r * sizes.d_nope] += share * row[r];
          }
        }
      }
    }
    out.up_k.insert(out.up_k.end(), up_k.begin(), up_k.end());
    for (Index r = 0; r < rank; ++r) {
      for (Index d = 0; d < s.dim; ++d) {
        out.up_v.push_back(static_cast<float>(basis[at((standing + j * s.dim + d) * rank + r)]));
      }
    }
  }
  out.out = w.out;
  check_weights(out);
  return out;
}

LatentWeights converted(const GqaWeights& weights, const Conversion& conversion,
                        View<const float> calibration) {
  return absorbed_weights(
      weights,
      cut_keys(weights.sizes,
               concentrated_keys(weights, calibration, fold_of(weights.sizes, conversion)),
               conversion),
      conversion, calibration);
}

GqaWeights grouped(const GqaWeights& weights, Index kv_heads, View<const float> x) {
  check_weights(weights);
  check_calibration(weights, x);
  GqaWeights w = with_neighbours(weights);
  const GqaSizes s = w.sizes;
  CHECK(kv_heads >= 1 && s.kv_heads % kv_heads == 0, kv_heads, s.kv_heads);
  const Index merged = s.kv_heads / kv_heads;  // key heads that become one
  const Index queries = s.heads / kv_heads;    // query heads that read it
  const Index width = merged * s.dim;
  const std::vector<double> from = in_double(x);
  GqaWeights out{s, w.q, {}, {}, w.out};
  out.sizes.kv_heads = kv_heads;
  out.k.resize(at(s.model * kv_heads * s.dim));
  out.v.resize(out.k.size());
  for (Index group = 0; group < kv_heads; ++group) {
    // The group as a layer of its own.
    const auto part = [&](const std::vector<float>& m, Index heads, Index first, Index count) {
      std::vector<float> cut;
      for (Index row = 0; row < s.model; ++row) {
        const auto head = m.begin() + (row * heads + first) * s.dim;
        cut.insert(cut.end(), head, head + count * s.dim);
      }
      return cut;
    };
    GqaWeights own{s,
                   part(w.q, s.heads, group * queries, queries),
                   part(w.k, s.kv_heads, group * merged, merged),
                   part(w.v, s.kv_heads, group * merged, merged),
                   {}};
    own.sizes.heads = queries;
    own.sizes.kv_heads = merged;
    const auto first_out = w.out.begin() + group * queries * s.dim * s.model;
    own.out.assign(first_out, first_out + queries * s.dim * s.model);

    const MergedKeys keys = concentrated_keys(own, x, 1);
    const Components c{own.sizes, keys};
    for (Index g = 0; g < c.groups(); ++g) {
      component(
          c, g, 0, own.k, merged, [](Index j) { return j; },
          [&](Index row, double re, double im) {
            const Index to = (row * kv_heads + group) * s.dim + 2 * g;
            out.k[at(to)] = static_cast<float>(re);
            out.k[at(to + 1)] = static_cast<float>(im);
          });
      for (Index h = 0; h < queries; ++h) {
        const Index key_head = h / (queries / merged);
        component(
            c, g, 0, own.q, queries, [&](Index j) { return j == key_head ? h : -1; },
            [&](Index row, double re, double im) {
              const Index to = (row * s.heads + group * queries + h) * s.dim + 2 * g;
              out.q[at(to)] = static_cast<float>(re);
              out.q[at(to + 1)] = static_cast<float>(im);
            });
      }
    }

    const std::vector<double> values = times(from, in_double(own.v), x.rows, s.model, width);
    require_finite(values);
    const std::vector<double> basis =
        columns_of(eigenvectors(gram(values, x.rows, width), width), width, 0, s.dim);
    const std::vector<double> v = times(in_double(own.v), basis, s.model, width, s.dim);
    for (Index row = 0; row < s.model; ++row) {
      for (Index d = 0; d < s.dim; ++d) {
        out.v[at((row * kv_heads + group) * s.dim + d)] =
            static_cast<float>(v[at(row * s.dim + d)]);
      }
    }
    for (Index h = 0; h < queries; ++h) {
      // The old values are basis times the new ones: O_h W_O,h = (new O_h) (basis^T W_O,h).
      const Index first = h / (queries / merged) * s.dim;
      std::vector<double> turned(at(s.dim * s.dim));
      for (Index i = 0; i < s.dim; ++i) {
        for (Index d = 0; d < s.dim; ++d) {
          turned[at(d * s.dim + i)] = basis[at((first + i) * s.dim + d)];
        }
      }
      const auto head = own.out.begin() + h * s.dim * s.model;
      const std::vector<double> made =
          times(turned, std::vector<double>(head, head + s.dim * s.model), s.dim, s.dim, s.model);
      std::transform(made.begin(), made.end(),
                     out.out.begin() + (group * queries + h) * s.dim * s.model,
                     [](double number) { return static_cast<float>(number); });
    }
  }
  return out;
}

}  // namespace dattn
