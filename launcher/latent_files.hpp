#pragma once

#include <string>
#include <vector>

#include "kernels/latent/weights.hpp"

namespace dattn {

/// The names of the files of a latent layer: PREFIX.json (sizes), then PREFIX.NAME.npy of each
/// matrix: down_kv, kv_gamma, up_q, up_k, up_v, out, shaped as in kernels/latent/weights.hpp.
std::vector<std::string> latent_files(const std::string& prefix);

/// Writes whole weights without compressed queries. All files are complete before the first gets
/// its name; PREFIX.json gets its last. Failure(output) if one cannot be written.
void write_latent_files(const std::string& prefix, const LatentWeights& weights);

}  // namespace dattn
