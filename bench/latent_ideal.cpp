#include "bench/latent_ideal.hpp"

#include <algorithm>

#include "kernels/check.hpp"

namespace dattn {

LatentCost cost_of(std::string_view form, int slices, const LatentStep& step) {
  const LatentSizes& s = step.sizes;
  const auto ranks = static_cast<Index>(step.ranks);
  const auto part = [](Index whole, Index parts) { return (whole + parts - 1) / parts; };
  const bool sliced = form == "exact" || form == "tpla";
  const bool by_heads = form == "heads";
  CHECK(sliced || by_heads || form == "sequence" || form == "helix" || form == "tree");
  const Index g = sliced ? slices : 1;
  CHECK(g >= 1 && ranks % g == 0, g, ranks);
  const Index heads = sliced ? part(s.heads, ranks / g) : by_heads ? part(s.heads, ranks) : s.heads;
  const Index latent = part(s.kv_rank, g);
  const Index row = latent + s.d_rope;
  Index keys = 0;
  for (const Index length : step.lengths) {
    keys += sliced || by_heads ? length : part(length, ranks);
  }
  // Heads whose W_UQ, W_UK, W_UV and W_O a rank reads.
  const Index own = sliced ? part(heads, g) : part(s.heads, ranks);
  const bool makes_all = form == "helix" || form == "tree";
  const Index q_heads = makes_all ? s.heads : own;
  const Index k_heads = makes_all ? s.heads : sliced ? heads : own;
  const Index v_heads = sliced ? heads : own;
  const Index weights = part(s.model * (s.q_rank + s.row()), ranks) +
                        q_heads * s.q_width() * s.d_qk() + k_heads * latent * s.d_nope +
                        v_heads * latent * s.d_v + own * s.d_v * s.model;
  const auto tokens = step.queries * static_cast<Index>(step.lengths.size());
  return {
      .attention_flops = 2.0 * static_cast<double>(keys * heads * step.queries * (row + latent)),
      .attention_bytes = static_cast<double>(keys * row * step.cache_element),
      .weights_flops = 2.0 * static_cast<double>(weights * tokens),
      .weights_bytes = static_cast<double>(weights * step.weight_element)};
}

double allowed_seconds(const LatentCost& cost, const LatentRates& rates) {
  return std::max(cost.attention_flops / rates.attention_flops,
                  cost.attention_bytes / rates.bytes) +
         std::max(cost.weights_flops / rates.weights_flops, cost.weights_bytes / rates.bytes);
}

}  // namespace dattn
