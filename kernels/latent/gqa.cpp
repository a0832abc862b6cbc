#include "kernels/latent/gqa.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/check.hpp"
#include "kernels/latent/dense.hpp"
#include "kernels/random.hpp"

namespace dattn {
namespace {

using Vector = std::vector<double>;

/// Head `head` of x M: M is [x, heads, dim].
Vector head_of(const float* x, const std::vector<float>& m, Index model, Index heads, Index dim,
               Index head) {
  Vector out(static_cast<std::size_t>(dim));
  for (Index i = 0; i < model; ++i) {
    const float* row = m.data() + (i * heads + head) * dim;
    for (std::size_t d = 0; d < out.size(); ++d) {
      out[d] += static_cast<double>(x[i]) * static_cast<double>(row[d]);
    }
  }
  return out;
}

void turn(const GqaSizes& s, Index position, Vector& x) {
  const std::size_t pairs = x.size() / 2;
  for (std::size_t i = 0; i < pairs; ++i) {
    const bool halves = s.pairs == RopePairs::halves;
    double& re = x[halves ? i : 2 * i];
    double& im = x[halves ? i + pairs : 2 * i + 1];
    const double angle =
        static_cast<double>(position) *
        std::pow(s.rope_base, -static_cast<double>(i) / static_cast<double>(pairs));
    const double turned = re * std::cos(angle) - im * std::sin(angle);
    im = re * std::sin(angle) + im * std::cos(angle);
    re = turned;
  }
}

}  // namespace

std::optional<std::string> complaint(const GqaSizes& s) {
  struct Extent {
    const char* name;
    Index value;
  };
  for (const auto& [name, value] :
       {Extent{"model", s.model}, Extent{"heads", s.heads}, Extent{"kv heads", s.kv_heads},
        Extent{"the head's dim", s.dim}}) {
    if (value < 1) return std::string(name) + " is " + std::to_string(value) + "; want at least 1";
  }
  if (s.heads % s.kv_heads != 0) {
    return std::to_string(s.heads) + " heads are no multiple of " + std::to_string(s.kv_heads) +
           " kv heads; want equal groups";
  }
  if (s.dim % 2 != 0) {
    return "the head's dim is " + std::to_string(s.dim) + "; it must be even, pairs are turned";
  }
  // Strides of matrices are ints in BLAS; `eigenvectors` takes keys and values at once.
  constexpr Index most = std::numeric_limits<int>::max();
  constexpr Index most_keys = most_eigenvectors / 2;
  if (s.model > most || s.heads > most / s.dim || s.kv_heads > most_keys / s.dim) {
    return "a matrix would be too large; want at most 2^31 - 1 columns, and " +
           std::to_string(most_keys) + " of keys";
  }
  if (!std::isfinite(s.rope_base) || s.rope_base <= 1) return "the base of RoPE must exceed 1";
  return std::nullopt;
}

void check_weights(const GqaWeights& w) {
  const GqaSizes& s = w.sizes;
  const auto why = complaint(s);
  CHECK(!why, why.value_or(""));
  CHECK(std::ssize(w.q) == s.model * s.heads * s.dim, w.q.size());
  CHECK(std::ssize(w.k) == s.model * s.kv_heads * s.dim, w.k.size());
  CHECK(std::ssize(w.v) == s.model * s.kv_heads * s.dim, w.v.size());
  CHECK(std::ssize(w.out) == s.model * s.heads * s.dim, w.out.size());
}

GqaWeights random_weights(const GqaSizes& s, std::int64_t seed) {
  GqaWeights w{s, {}, {}, {}, {}};
  std::uint64_t name = 0;
  const auto fill = [&](std::vector<float>& to, Index inputs, Index outputs) {
    const std::uint64_t stream = mixed(mixed(static_cast<std::uint64_t>(seed)) + ++name);
    const double deviation = 1 / std::sqrt(static_cast<double>(inputs));
    to.resize(static_cast<std::size_t>(inputs * outputs));
    for (std::size_t i = 0; i < to.size(); ++i) {
      to[i] = static_cast<float>(deviation * normal(stream, i));
    }
  };
  fill(w.q, s.model, s.heads * s.dim);
  fill(w.k, s.model, s.kv_heads * s.dim);
  fill(w.v, s.model, s.kv_heads * s.dim);
  fill(w.out, s.heads * s.dim, s.model);
  return w;
}

GqaWeights with_neighbours(GqaWeights w) {
  check_weights(w);
  if (w.sizes.pairs == RopePairs::neighbours) return w;
  const Index pairs = w.sizes.dim / 2;
  std::vector<float> head(static_cast<std::size_t>(w.sizes.dim));
  for (std::vector<float>* m : {&w.q, &w.k}) {
    for (auto at = m->begin(); at != m->end(); at += w.sizes.dim) {
      std::copy_n(at, w.sizes.dim, head.begin());
      for (Index i = 0; i < pairs; ++i) {
        at[2 * i] = head[static_cast<std::size_t>(i)];
        at[2 * i + 1] = head[static_cast<std::size_t>(i + pairs)];
      }
    }
  }
  w.sizes.pairs = RopePairs::neighbours;
  return w;
}

std::vector<double> gqa_reference(const GqaWeights& w, View<const float> x, Index queries) {
  check_weights(w);
  const GqaSizes& s = w.sizes;
  CHECK(x.heads == 1 && x.dim == s.model && queries <= x.rows, x.heads, x.dim, x.rows, queries);
  Vector y(static_cast<std::size_t>(queries * s.model));
  const Index group = s.heads / s.kv_heads;
  std::vector<Vector> k, v;
  for (Index h = 0; h < s.heads; ++h) {
    if (h % group == 0) {
      k.clear();
      v.clear();
      for (Index n = 0; n < x.rows; ++n) {
        k.push_back(head_of(x.at(n, 0), w.k, s.model, s.kv_heads, s.dim, h / group));
        v.push_back(head_of(x.at(n, 0), w.v, s.model, s.kv_heads, s.dim, h / group));
        turn(s, n, k.back());
      }
    }
    for (Index i = 0; i < queries; ++i) {
      const Index position = x.rows - queries + i;
      Vector q = head_of(x.at(position, 0), w.q, s.model, s.heads, s.dim, h);
      turn(s, position, q);
      Vector weight;  // of the tokens up to this one
      for (Index n = 0; n <= position; ++n) {
        double score = 0;
        const Vector& key = k[static_cast<std::size_t>(n)];
        for (std::size_t d = 0; d < q.size(); ++d) score += q[d] * key[d];
        weight.push_back(score / std::sqrt(static_cast<double>(s.dim)));
      }
      const double top = *std::max_element(weight.begin(), weight.end());
      double sum = 0;
      for (double& score : weight) sum += score = std::exp(score - top);
      Vector o(static_cast<std::size_t>(s.dim));
      for (std::size_t n = 0; n < weight.size(); ++n) {
        for (std::size_t d = 0; d < o.size(); ++d) o[d] += weight[n] / sum * v[n][d];
      }
      for (std::size_t d = 0; d < o.size(); ++d) {
        const float* row = w.out.data() + (h * s.dim + static_cast<Index>(d)) * s.model;
        for (Index m = 0; m < s.model; ++m) {
          y[static_cast<std::size_t>(i * s.model + m)] += o[d] * static_cast<double>(row[m]);
        }
      }
    }
  }
  return y;
}

}  // namespace dattn
