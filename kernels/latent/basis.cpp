#include "kernels/latent/basis.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels/check.hpp"
#include "kernels/latent/dense.hpp"
#include "kernels/latent/product.hpp"
#include "kernels/random.hpp"

namespace dattn {

LatentWeights folded(LatentWeights w) {
  check_weights(w);
  const LatentSizes& s = w.sizes;
  const Index latent = w.part.latent.size();
  const float* gamma = w.kv_gamma.data() + (w.part.latent.begin - w.part.columns.begin);
  const auto scale = [&](std::vector<float>& up, Index dim) {
    for (std::size_t i = 0; i < up.size(); ++i) {
      up[i] *= gamma[static_cast<Index>(i) / dim % latent];
    }
  };
  scale(w.up_k, s.d_nope);
  scale(w.up_v, s.d_v);
  std::fill(w.kv_gamma.begin(), w.kv_gamma.end(), 1.0f);
  return w;
}

LatentWeights rotated(const LatentWeights& weights, const std::vector<float>& u) {
  const LatentSizes& s = weights.sizes;
  const Index rank = s.kv_rank;
  CHECK(weights.part.latent.size() == rank, weights.part.latent.begin, weights.part.latent.end);
  CHECK(static_cast<Index>(u.size()) == rank * rank, u.size(), rank);
  LatentWeights w = folded(weights);
  std::vector<Product> products{{.a = weights.down_kv.data(),
                                 .a_stride = s.row(),
                                 .b = u.data(),
                                 .b_stride = rank,
                                 .c = w.down_kv.data(),
                                 .c_stride = s.row(),
                                 .rows = s.model,
                                 .columns = rank,
                                 .inner = rank}};
  std::vector<float> turned(u.size());  // U^T
  for (Index i = 0; i < rank; ++i) {
    for (Index j = 0; j < rank; ++j) {
      turned[static_cast<std::size_t>(j * rank + i)] = u[static_cast<std::size_t>(i * rank + j)];
    }
  }
  const std::vector<float> up_k = w.up_k;
  const std::vector<float> up_v = w.up_v;
  for (Index h = 0; h < w.part.heads.size(); ++h) {
    for (const auto& [from, to, dim] :
         {std::tuple{&up_k, &w.up_k, s.d_nope}, std::tuple{&up_v, &w.up_v, s.d_v}}) {
      products.push_back({.a = turned.data(),
                          .a_stride = rank,
                          .b = from->data() + h * rank * dim,
                          .b_stride = dim,
                          .c = to->data() + h * rank * dim,
                          .c_stride = dim,
                          .rows = rank,
                          .columns = dim,
                          .inner = rank});
    }
  }
  multiply(products, Work{});
  return w;
}

LatentWeights decaying(LatentWeights w, double exponent) {
  const Index rank = w.sizes.kv_rank;
  CHECK(w.part.columns.size() == rank, w.part.columns.size(), rank);
  const bool mixes = (rank & (rank - 1)) == 0;
  const std::vector<float> u = mixes ? hadamard_basis(rank, 2) : std::vector<float>{};
  const Index width = rank + w.sizes.d_rope;
  std::vector<float> row(static_cast<std::size_t>(rank));
  for (Index m = 0; m < w.sizes.model; ++m) {
    float* columns = w.down_kv.data() + m * width;
    for (Index j = 0; j < rank; ++j) {
      columns[j] *= static_cast<float>(std::pow(1 + static_cast<double>(j), -exponent));
    }
    if (!mixes) continue;
    std::fill(row.begin(), row.end(), 0.0F);
    for (Index j = 0; j < rank; ++j) {
      for (Index i = 0; i < rank; ++i) {
        row[static_cast<std::size_t>(i)] += columns[j] * u[static_cast<std::size_t>(j * rank + i)];
      }
    }
    std::copy(row.begin(), row.end(), columns);
  }
  return w;
}

std::vector<float> hadamard_basis(Index rank, std::int64_t seed) {
  if (rank < 1 || (rank & (rank - 1)) != 0) {
    throw std::invalid_argument("the Hadamard basis wants a kv rank that is a power of two, not " +
                                std::to_string(rank) + "; choose another basis");
  }
  std::vector<float> u(static_cast<std::size_t>(rank * rank));
  const double unit = 1 / std::sqrt(static_cast<double>(rank));
  const std::uint64_t stream = mixed(static_cast<std::uint64_t>(seed));
  for (Index i = 0; i < rank; ++i) {
    const bool flipped = (mixed(stream + static_cast<std::uint64_t>(i)) >> 63) != 0;
    for (Index j = 0; j < rank; ++j) {
      // Sylvester: the sign is the parity of the bits that i and j share.
      const bool minus = (__builtin_popcountll(static_cast<std::uint64_t>(i & j)) % 2 != 0);
      u[static_cast<std::size_t>(i * rank + j)] =
          static_cast<float>(minus != flipped ? -unit : unit);
    }
  }
  return u;
}

std::vector<float> pca_basis(View<const float> latents) {
  const Index rank = latents.dim;
  CHECK(latents.heads == 1 && rank >= 1, latents.heads, rank);
  if (latents.rows == 0) throw std::invalid_argument("the PCA basis wants latents of some tokens");
  const auto n = static_cast<std::size_t>(rank);
  const auto tokens = static_cast<double>(latents.rows);
  std::vector<double> mean(n);
  for (Index row = 0; row < latents.rows; ++row) {
    for (std::size_t i = 0; i < n; ++i) mean[i] += static_cast<double>(latents.at(row, 0)[i]);
  }
  for (double& x : mean) x /= tokens;
  std::vector<double> a(n * n);
  std::vector<double> x(n);
  for (Index row = 0; row < latents.rows; ++row) {
    for (std::size_t i = 0; i < n; ++i) {
      x[i] = static_cast<double>(latents.at(row, 0)[i]) - mean[i];
      if (!std::isfinite(x[i])) {
        throw std::invalid_argument("the PCA basis wants latents that are finite");
      }
    }
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j <= i; ++j) a[i * n + j] += x[i] * x[j] / tokens;
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < i; ++j) a[j * n + i] = a[i * n + j];
  }
  const std::vector<double> u = eigenvectors(std::move(a), rank);
  return {u.begin(), u.end()};
}

}  // namespace dattn
