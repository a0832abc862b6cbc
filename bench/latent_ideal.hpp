#pragma once

#include <string_view>
#include <vector>

#include "kernels/latent/sizes.hpp"

namespace dattn {

/// What a rank must do in a step of decoding in latent attention, of the rank that has most to do.
/// Messages are not counted.
struct LatentCost {
  double attention_flops = 0;
  double attention_bytes = 0;  ///< of the cache, each row read once
  double weights_flops = 0;
  double weights_bytes = 0;  ///< each weight read once
};

/// A step of a layer over ranks.
struct LatentStep {
  LatentSizes sizes;
  std::vector<Index> lengths;  ///< tokens of each sequence, the new ones among them
  Index queries = 1;           ///< new tokens of each
  Index cache_element = 4;     ///< bytes
  Index weight_element = 4;    ///< bytes
  int ranks = 1;
};

/// The cost of a form of `dattn decode`, heads, sequence, helix, tree, exact or tpla, the last two
/// with so many slices of the latent; meshes are the forms' own. @pre slices divide the ranks
LatentCost cost_of(std::string_view form, int slices, const LatentStep& step);

/// Rates of a rank while all are at work.
struct LatentRates {
  double attention_flops;  ///< a second, of the type of the cache
  double weights_flops;    ///< a second, in float32
  double bytes;            ///< a second
};

/// Seconds that these rates allow: attention, then the products with weights, either as long as its
/// operations or its bytes take, whichever take longer.
double allowed_seconds(const LatentCost& cost, const LatentRates& rates);

}  // namespace dattn
