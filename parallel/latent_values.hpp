#pragma once

#include <variant>
#include <vector>

#include "kernels/attend.hpp"
#include "kernels/latent/weights.hpp"
#include "parallel/latent_parts.hpp"

namespace dattn {

/// Bytes of a step of `latent-sequence`, of all ranks, that depend on where W_UV is applied.
struct ValuesBytes {
  Index sent = 0;  ///< Partials
  Index read = 0;  ///< of W_UV
  Index sum() const { return sent + read; }
};

/// Of `rows` rows (sequences * new tokens). Partials have kv_rank numbers a head behind the merge,
/// d_v before it; there each rank reads W_UV of all heads, behind it of those it gets.
ValuesBytes values_bytes(const LatentSizes& sizes, Index rows, int ranks, Type weight_type,
                         Values where);

/// Where there are fewer of these bytes; after the merge if there are as many.
Values fewer_bytes(const LatentSizes& sizes, Index rows, int ranks, Type weight_type);

/// W_UV of all heads, applied before Partials of ranks that split the tokens are merged by heads:
/// it is linear, so that Partials of values merge as those of latents do.
class PartialValues {
 public:
  /// `parts` are the heads that each rank gets, all of them in order. `weights` is asked for a
  /// rank's heads at a time, since it makes more than W_UV.
  PartialValues(const LatentSizes& sizes, const MakeWeights& weights, std::vector<Range> parts,
                Type weight_type);

  /// From what this rank's keys give, O [rows, all heads, kv_rank] and LSE [rows, all heads], the
  /// values [rows, own heads, d_v] and LSE [rows, own heads] over the keys of all ranks. One
  /// message from each rank to each, merged in the order of ranks; with `verifies` each is held
  /// against its Envelope. Collective; seconds are those of the exchange.
  template <comm::Transport T>
  HandOver merge(T& transport, const Hosts& hosts, View<const float> o, std::span<const float> lse,
                 std::vector<float>& values, std::vector<float>& merged, const Work& work,
                 bool verifies) const;

 private:
  std::vector<float> records(View<const float> o, std::span<const float> lse,
                             const Work& work) const;

  LatentSizes sizes_;
  std::vector<Range> parts_;
  std::variant<std::vector<float>, std::vector<BFloat16>> up_v_;  ///< [heads, kv_rank, d_v]
};

}  // namespace dattn
