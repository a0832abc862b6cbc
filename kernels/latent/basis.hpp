#pragma once

#include <cstdint>
#include <vector>

#include "kernels/latent/weights.hpp"
#include "kernels/view.hpp"

namespace dattn {

// Another basis for the latent, so that slices of it carry like shares (TPLA). An orthogonal U
// commutes with RMSNorm, rms(c U) = rms(c), but only without gamma, which is therefore folded into
// W_UK and W_UV first. Neither changes what the layer computes.
// Source: TPLA (arXiv 2508.15881, 2025).

/// The weights with diag(gamma) W_UK and diag(gamma) W_UV, and kv_gamma = 1.
LatentWeights folded(LatentWeights weights);

/// The weights folded, in the basis U [kv_rank, kv_rank] (row-major; latents become c U):
/// W_DKV U, U^T diag(gamma) W_UK, U^T diag(gamma) W_UV. Slices of the result are slices of c U.
/// @pre the weights hold the whole latent; U is orthogonal
LatentWeights rotated(const LatentWeights& weights, const std::vector<float>& u);

/// The weights with a spectrum of latents as trained models have it, for tests and benches: column
/// j of W_DKV by (1 + j)^-exponent, then, where the rank is a power of two, in a Hadamard basis,
/// which no slice is aligned with. Another layer, not the same one in another basis.
/// @pre the weights hold all columns
LatentWeights decaying(LatentWeights weights, double exponent);

/// U = diag(random signs) H / sqrt(rank), H by Sylvester: spreads what a latent has over all its
/// dims. Signs come before H: behind it they would only flip what is cached. Throws
/// std::invalid_argument unless the rank is a power of two.
std::vector<float> hadamard_basis(Index rank, std::int64_t seed);

/// U by principal components of latents [tokens, 1, rank] (after RMSNorm, with folded weights): the
/// eigenvectors of their covariance as columns, the largest variance first, each with its largest
/// component positive. In double (dense.hpp). Throws std::invalid_argument
/// where there are no tokens or numbers that are not finite.
std::vector<float> pca_basis(View<const float> latents);

}  // namespace dattn
