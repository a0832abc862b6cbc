#pragma once

#include "kernels/mask.hpp"

namespace dattn {

/// How the kernels of a machine cut a block: rows that share a register are computed together for
/// every key that one of them sees, in pieces of neighbouring keys.
struct Grain {
  Index lanes = 0;    ///< rows times heads that are computed together; 0: each pair by itself
  Index granule = 1;  ///< keys of a piece
};

/// Pairs of one head in a block that kernels take more time for than for those allowed.
struct Extra {
  double beside = 0;  ///< computed and not allowed: some other row of the piece sees the key
  double masked = 0;  ///< computed in pieces that are not allowed whole
};

/// What the mask cuts apart between rows at `queries` and keys at `keys`: counted where some
/// `samples` groups of rows, evenly spread, share registers with `heads` heads, and taken for all.
/// Exact where that is all of them. Masks with a step are taken residue by residue, as kernels do.
/// Keys that a kernel would take in an order of its own (S2's shards) count as they lie.
Extra extra_pairs(const Mask& mask, Index head, const Runs& queries, const Runs& keys,
                  const Grain& grain, Index heads, Index samples);

/// Time that masking takes of a pair, in the time of a pair: what score and mask have to do with
/// each other is looked up lane by lane. Forward 0.9 to 1.0 (AVX-512, float32 and bfloat16),
/// backward 0.1 to 0.6, by least squares over bench_forecast's masks.
inline constexpr double kMaskedForward = 1.0;
inline constexpr double kMaskedBackward = 0.4;

}  // namespace dattn
