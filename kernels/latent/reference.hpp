#pragma once

#include <vector>

#include "kernels/latent/weights.hpp"
#include "kernels/view.hpp"

namespace dattn {

/// The judge: one layer in double by its definitions, keys and values expanded. x [tokens, 1,
/// model] holds a sequence from its first token on; y [queries, model] is of the last `queries`
/// tokens, each attending to itself and to all before it.
/// @pre the weights are whole; queries <= tokens
std::vector<double> latent_reference(const LatentWeights& weights, View<const float> x,
                                     Index queries);

/// The same for the tokens at `positions`, in their order.
std::vector<double> latent_reference(const LatentWeights& weights, View<const float> x,
                                     const Runs& positions);

}  // namespace dattn
