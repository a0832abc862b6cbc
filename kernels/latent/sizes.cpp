#include "kernels/latent/sizes.hpp"

#include <array>
#include <cmath>
#include <limits>
#include <numbers>

namespace dattn {
namespace {

constexpr Rope kDeepSeekV2Lite{.factor = 40, .mscale = 0.707, .mscale_all_dim = 0.707};
constexpr Rope kDeepSeekV3{.factor = 40};
constexpr Rope kKimiK2{.base = 50000, .factor = 32, .beta_fast = 1};

// Source: config.json of deepseek-ai/DeepSeek-V2-Lite, deepseek-ai/DeepSeek-V3 and
// moonshotai/Kimi-K2-Instruct.
constexpr std::array<LatentModel, 3> kModels{{
    {"deepseek-v2-lite", {.model = 2048, .heads = 16, .rope = kDeepSeekV2Lite}},
    {"deepseek-v3", {.model = 7168, .heads = 128, .q_rank = 1536, .rope = kDeepSeekV3}},
    {"kimi-k2", {.model = 7168, .heads = 64, .q_rank = 1536, .rope = kKimiK2}},
}};

double yarn_magnitude(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

/// Numbers that have each frequency once, in pairs.
Index turned(const LatentSizes& sizes) { return sizes.d_rope / sizes.rope.copies; }

/// The pair that makes `turns` turns in the original context, as a fraction.
double pair_of(const LatentSizes& sizes, double turns) {
  const Rope& rope = sizes.rope;
  return static_cast<double>(turned(sizes)) *
         std::log(static_cast<double>(rope.original) / (turns * 2 * std::numbers::pi)) /
         (2 * std::log(rope.base));
}

}  // namespace

double LatentSizes::scale() const {
  const double magnitude = yarn_magnitude(rope.factor, rope.mscale_all_dim);
  return magnitude * magnitude / std::sqrt(static_cast<double>(d_qk()));
}

std::optional<std::string> complaint(const LatentSizes& sizes) {
  struct Extent {
    const char* name;
    Index value;
  };
  for (const auto& [name, value] :
       {Extent{"model", sizes.model}, Extent{"heads", sizes.heads},
        Extent{"kv rank", sizes.kv_rank}, Extent{"d_nope", sizes.d_nope},
        Extent{"d_rope", sizes.d_rope}, Extent{"d_v", sizes.d_v},
        Extent{"original tokens of YaRN", sizes.rope.original},
        Extent{"copies of RoPE", sizes.rope.copies}}) {
    if (value < 1) return std::string(name) + " is " + std::to_string(value) + "; want at least 1";
  }
  if (sizes.q_rank < 0) {
    return "q rank is " + std::to_string(sizes.q_rank) + "; want at least 0 (0: no compression)";
  }
  if (sizes.d_rope % 2 != 0) {
    return "d_rope is " + std::to_string(sizes.d_rope) + "; it must be even, pairs are turned";
  }
  if (sizes.d_rope % (2 * sizes.rope.copies) != 0) {
    return "d_rope is " + std::to_string(sizes.d_rope) + "; its " +
           std::to_string(sizes.rope.copies) + " copies must be equal, each of pairs";
  }
  // Strides of matrices are ints in BLAS.
  constexpr Index most = std::numeric_limits<int>::max();
  const auto fits = [](Index a, Index b) { return a <= most && b <= most && a <= most / b; };
  if (!fits(sizes.model, 1) || !fits(sizes.q_rank, 1) || !fits(sizes.kv_rank, 1) ||
      !fits(sizes.d_rope, 1) || !fits(sizes.kv_rank + sizes.d_rope, 1) || !fits(sizes.d_nope, 1) ||
      !fits(sizes.d_nope + sizes.d_rope, sizes.heads) || !fits(sizes.row(), sizes.heads) ||
      !fits(sizes.d_v, sizes.heads)) {
    return "a matrix would have more than 2^31 - 1 columns; want fewer heads or smaller dims";
  }
  const auto sound = [](double x) { return std::isfinite(x) && x > 0; };
  if (!sound(sizes.rope.base) || sizes.rope.base <= 1) return "the base of RoPE must exceed 1";
  if (!sound(sizes.rope.factor) || sizes.rope.factor < 1) {
    return "the factor of YaRN must be at least 1 (1: no YaRN)";
  }
  if (!sound(sizes.rope.beta_fast) || !sound(sizes.rope.beta_slow) ||
      sizes.rope.beta_fast < sizes.rope.beta_slow) {
    return "YaRN wants beta_fast >= beta_slow > 0";
  }
  if (!std::isfinite(sizes.rope.mscale) || sizes.rope.mscale < 0 ||
      !std::isfinite(sizes.rope.mscale_all_dim) || sizes.rope.mscale_all_dim < 0) {
    return "mscale and mscale_all_dim of YaRN must be at least 0";
  }
  if (!std::isfinite(sizes.epsilon) || sizes.epsilon < 0) {
    return "epsilon of RMSNorm must be at least 0";
  }
  return std::nullopt;
}

std::span<const LatentModel> latent_models() { return kModels; }

const LatentSizes* find_latent_model(std::string_view name) {
  for (const LatentModel& model : kModels) {
    if (model.name == name) return &model.sizes;
  }
  return nullptr;
}

std::vector<double> rope_frequencies(const LatentSizes& sizes) {
  const Rope& rope = sizes.rope;
  std::vector<double> out(static_cast<std::size_t>(sizes.d_rope / 2));
  double low = std::max(std::floor(pair_of(sizes, rope.beta_fast)), 0.0);
  double high =
      std::min(std::ceil(pair_of(sizes, rope.beta_slow)), static_cast<double>(turned(sizes) - 1));
  if (low == high) high += 0.001;  // as published: a ramp without width
  for (std::size_t i = 0; i < out.size(); ++i) {
    const auto pair = static_cast<double>(static_cast<Index>(i) % (turned(sizes) / 2));
    const double plain = std::pow(rope.base, -2 * pair / static_cast<double>(turned(sizes)));
    const double slow = std::clamp((pair - low) / (high - low), 0.0, 1.0);
    out[i] = rope.factor <= 1 ? plain : plain * (slow / rope.factor + (1 - slow));
  }
  return out;
}

double rope_magnitude(const Rope& rope) {
  return yarn_magnitude(rope.factor, rope.mscale) /
         yarn_magnitude(rope.factor, rope.mscale_all_dim);
}

Shape absorbed_shape(const LatentSizes& sizes, Index queries, Index keys, Index latent) {
  return {.queries = queries,
          .keys = keys,
          .query_heads = sizes.heads,
          .key_heads = 1,
          .value_heads = 1,
          .d_qk = latent + sizes.d_rope,
          .d_v = latent};
}

Shape expanded_shape(const LatentSizes& sizes, Index queries, Index keys) {
  return {.queries = queries,
          .keys = keys,
          .query_heads = sizes.heads,
          .key_heads = sizes.heads,
          .value_heads = sizes.heads,
          .d_qk = sizes.d_qk(),
          .d_v = sizes.d_v};
}

}  // namespace dattn
