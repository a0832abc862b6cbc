#pragma once

#include <functional>

#include "kernels/bfloat.hpp"
#include "kernels/isa.hpp"
#include "kernels/mask.hpp"
#include "kernels/score.hpp"
#include "kernels/view.hpp"
#include "kernels/workspace.hpp"

namespace dattn {

/// Which part of the whole problem some views hold: global heads and positions, row by row.
struct Where {
  Shape shape;
  Range query_heads;
  Range key_heads;
  Range value_heads;
  Runs queries;  ///< positions of the rows of Q
  Runs keys;     ///< positions of the rows of K and V
  /// Log-weights [keys, key heads, 1] added to the scores of keys that stand for several
  /// (pseudo-keys: merged or dropped tokens), or empty.
  View<const float> key_weights = {};
};

/// How a kernel works on one rank.
struct Work {
  Score score = {};
  int threads = 1;                  ///< OpenMP threads
  std::function<void()> poll = {};  ///< called by the calling thread between tiles, may be empty
  const Isa* isa = nullptr;         ///< instruction set; null: chosen_isa()
  Workspace* workspace = nullptr;   ///< memory kept from call to call; null: of this call only
};

/// out <- out merged with attention of q to k, v under `mask`.
///
/// q [rows, query heads, d_qk], k [keys, key heads, d_qk], v [keys, value heads, d_v], out
/// [rows, query heads, d_v + 2] (records, kernels/partial.hpp). Tiles that the mask empties cost
/// nothing. The result does not depend on the number of threads. NaN and infinity in Q, K or V
/// reach exactly the rows that see them; a score of -inf weighs nothing, as if its key were not
/// there. Sigmoid attention adds (0, sum of weights, sum of weight * v) to the records, which merge
/// as those of softmax do; its O is the last part of a record, undivided.
/// Source: FlashAttention-2 (Dao 2023), transposed; split over keys as Flash-Decoding where queries
/// are few.
/// @pre every query head's key and value head is among where.key_heads, where.value_heads
void attend(View<const float> q, View<const float> k, View<const float> v, View<float> out,
            const Where& where, const Mask& mask, const Work& work);

/// The same on bfloat16 inputs; every sum is kept in float.
void attend(View<const BFloat16> q, View<const BFloat16> k, View<const BFloat16> v, View<float> out,
            const Where& where, const Mask& mask, const Work& work);

/// Memory in bytes that attend takes with this kernel beside its arguments, at most, for a block of
/// `queries` rows of `query_heads` heads and `keys` rows.
Index attend_bytes(const Shape& shape, Index queries, Index query_heads, Index keys, int threads,
                   const Kernel& kernel);

/// The same in double, by the reference loops: exact to double rounding, and slow.
void attend(View<const double> q, View<const double> k, View<const double> v, View<double> out,
            const Where& where, const Mask& mask, const Work& work);

}  // namespace dattn
