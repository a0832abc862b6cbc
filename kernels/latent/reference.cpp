#include "kernels/latent/reference.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/check.hpp"
#include "kernels/dot.hpp"

namespace dattn {
namespace {

using Vector = std::vector<double>;

/// x M for the columns [first, first + count) of a row-major M whose rows have `stride` numbers.
Vector times(const Vector& x, const float* m, Index stride, Index count) {
  Vector out(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float* row = m + static_cast<Index>(i) * stride;
    for (std::size_t j = 0; j < out.size(); ++j) out[j] += x[i] * static_cast<double>(row[j]);
  }
  return out;
}

Vector normed(Vector x, const std::vector<float>& gamma, double epsilon) {
  double sum = 0;
  for (const double number : x) sum += number * number;
  const double rms = std::sqrt(sum / static_cast<double>(x.size()) + epsilon);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] *= static_cast<double>(gamma[i]) / rms;
  return x;
}

/// The pairs (x[2i], x[2i + 1]) from x[first] on, as complex numbers times
/// magnitude * exp(i position frequency).
void turn(const LatentSizes& sizes, Index position, Vector& x, Index first) {
  const Vector frequencies = rope_frequencies(sizes);
  const double magnitude = rope_magnitude(sizes.rope);
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    double& re = x[static_cast<std::size_t>(first) + 2 * i];
    double& im = x[static_cast<std::size_t>(first) + 2 * i + 1];
    const double angle = static_cast<double>(position) * frequencies[i];
    const double turned = magnitude * (re * std::cos(angle) - im * std::sin(angle));
    im = magnitude * (re * std::sin(angle) + im * std::cos(angle));
    re = turned;
  }
}

double dot(const Vector& a, const Vector& b) {
  return dattn::dot(a.data(), b.data(), std::ssize(a));
}

}  // namespace

std::vector<double> latent_reference(const LatentWeights& w, View<const float> x, Index queries) {
  CHECK(0 <= queries && queries <= x.rows, queries, x.rows);
  return latent_reference(w, x, {{x.rows - queries, queries, 1}});
}

std::vector<double> latent_reference(const LatentWeights& w, View<const float> x,
                                     const Runs& positions) {
  check_weights(w);
  CHECK(w.part == whole(w.sizes));
  const LatentSizes& s = w.sizes;
  CHECK(x.heads == 1 && x.dim == s.model, x.heads, x.dim, s.model);
  std::vector<Index> asked;
  for (const Run& run : positions) {
    for (Index i = 0; i < run.count; ++i) asked.push_back(run.at(i));
  }
  for (const Index n : asked) CHECK(0 <= n && n < x.rows, n, x.rows);
  const auto token = [&](Index n) { return Vector(x.at(n, 0), x.at(n, 0) + s.model); };

  std::vector<Vector> latent, key;  // of each token: RMSNorm(x W_DKV) gamma, RoPE(x W_KR)
  for (Index n = 0; n < x.rows; ++n) {
    latent.push_back(
        normed(times(token(n), w.down_kv.data(), s.row(), s.kv_rank), w.kv_gamma, s.epsilon));
    key.push_back(times(token(n), w.down_kv.data() + s.kv_rank, s.row(), s.d_rope));
    turn(s, n, key.back(), 0);
  }
  std::vector<Vector> q_from;
  for (const Index n : asked) {
    q_from.push_back(s.q_rank == 0 ? token(n)
                                   : normed(times(token(n), w.down_q.data(), s.q_rank, s.q_rank),
                                            w.q_gamma, s.epsilon));
  }

  Vector y(asked.size() * static_cast<std::size_t>(s.model));
  for (Index h = 0; h < s.heads; ++h) {
    std::vector<Vector> k, v;
    for (std::size_t n = 0; n < latent.size(); ++n) {
      k.push_back(times(latent[n], w.up_k.data() + h * s.kv_rank * s.d_nope, s.d_nope, s.d_nope));
      k.back().insert(k.back().end(), key[n].begin(), key[n].end());
      v.push_back(times(latent[n], w.up_v.data() + h * s.kv_rank * s.d_v, s.d_v, s.d_v));
    }
    for (std::size_t i = 0; i < asked.size(); ++i) {
      const Index position = asked[i];
      Vector q = times(q_from[i], w.up_q.data() + h * s.d_qk(), s.heads * s.d_qk(), s.d_qk());
      turn(s, position, q, s.d_nope);
      Vector weight;  // of the tokens up to this one
      for (Index n = 0; n <= position; ++n) {
        weight.push_back(s.scale() * dot(q, k[static_cast<std::size_t>(n)]));
      }
      const double top = *std::max_element(weight.begin(), weight.end());
      double sum = 0;
      for (double& score : weight) sum += score = std::exp(score - top);
      Vector o(static_cast<std::size_t>(s.d_v));
      for (std::size_t n = 0; n < weight.size(); ++n) {
        for (std::size_t d = 0; d < o.size(); ++d) o[d] += weight[n] / sum * v[n][d];
      }
      const Vector out = times(o, w.out.data() + h * s.d_v * s.model, s.model, s.model);
      for (std::size_t d = 0; d < out.size(); ++d) {
        y[i * static_cast<std::size_t>(s.model) + d] += out[d];
      }
    }
  }
  return y;
}

}  // namespace dattn
