#pragma once

#include <string>
#include <vector>

#include "kernels/latent/weights.hpp"
#include "launcher/npy.hpp"

namespace dattn {

/// The names of the files of a latent layer: PREFIX.json (sizes), then PREFIX.NAME.npy of each
/// matrix: down_q and q_gamma (where queries are compressed), down_kv, kv_gamma, up_q, up_k, up_v,
/// out, shaped as in kernels/latent/weights.hpp.
std::vector<std::string> latent_files(const std::string& prefix, const LatentSizes& sizes);

/// Writes whole weights without YaRN. All files are complete before the first gets its name;
/// PREFIX.json gets its last. Failure(output) if one cannot be written.
void write_latent_files(const std::string& prefix, const LatentWeights& weights);

/// The weights of a layer as files, looked at but not yet read.
class LatentFiles {
 public:
  /// Opens all files; Failure(input) unless PREFIX.json has sound sizes and every matrix, of f2, f4
  /// or f8, the shape that follows from them. `option` is whom messages name.
  LatentFiles(const std::string& option, const std::string& prefix);

  const LatentSizes& sizes() const { return sizes_; }
  const std::vector<std::string>& paths() const { return paths_; }

  /// The weights of these heads, with the whole latent. Reads no other heads.
  LatentWeights read(Range heads) const;

  /// A sum over the sizes and every number of every matrix.
  std::string sum() const;

 private:
  LatentSizes sizes_;
  std::string text_;                ///< of PREFIX.json
  std::vector<std::string> paths_;  ///< as latent_files()
  std::vector<NpyReader> files_;    ///< of the matrices, in that order
};

}  // namespace dattn
