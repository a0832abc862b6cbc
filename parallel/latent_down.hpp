#pragma once

#include <variant>

#include "kernels/attend.hpp"
#include "kernels/latent/weights.hpp"
#include "parallel/all_reduce.hpp"

namespace dattn {

struct LatentTimes;

/// x W_DQ and x W_DKV of the new tokens of a step. No head has a part of these products, so heads
/// do not split them; columns do: each rank holds some of both matrices and makes these numbers of
/// every token, and one exchange gives all numbers to all. Made on every rank they would be most of
/// what it reads, where many ranks split the heads (DeepSeek-V3: 15 of 187 million weights).
template <comm::Transport T>
class DownProjections {
 public:
  /// Takes its columns of W_DQ, which `weights` has no longer then, and of W_DKV. Collective calls
  /// later on, none here. @pre the weights hold all columns, the same ones on every rank; `group`
  /// is all ranks and outlives this
  DownProjections(StoredWeights& weights, AllReduce<T>& group);

  /// x [tokens, 1, model], the same on every rank, -> queries() and latents(), which are read until
  /// the next call. Counts its time, bytes and messages. Collective.
  void make(View<const float> x, const Work& work, LatentTimes& times);

  /// What queries are made from, as compressed_queries() has it: [tokens, 1, q_width].
  View<const float> queries() const { return queries_; }
  /// As latents() of the operators has them: [tokens, 1, kv_rank + d_rope].
  View<const float> latents() const { return latents_; }

 private:
  AllReduce<T>& group_;
  LatentSizes sizes_;
  std::vector<float> q_gamma_;
  std::vector<Range> parts_;  ///< of each rank, of the columns of W_DQ beside W_DKV beside W_KR
  std::variant<std::vector<float>, std::vector<BFloat16>> columns_;  ///< [model, own part]
  std::vector<float> numbers_;                                       ///< [tokens, all columns]
  View<const float> queries_, latents_;
};

}  // namespace dattn
