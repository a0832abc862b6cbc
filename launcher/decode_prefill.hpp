#pragma once

#include <nlohmann/json.hpp>

#include "launcher/decode_check.hpp"
#include "launcher/decode_options.hpp"
#include "parallel/latent_prefill.hpp"

namespace dattn {

/// The prefill of `dattn decode --cache prefill`: what comes before there is a layer that decodes.
class DecodePrefill {
 public:
  /// Collective: prefills the context of every sequence; with --check, y of all its tokens is held
  /// to the layer in double. `weights` makes those of all heads in the basis of the cache, `model`
  /// those of the model.
  DecodePrefill(comm::Communicator& world, const DecodeOptions& options,
                const std::function<LatentWeights()>& weights, const MakeWeights& model,
                const Hidden& hidden, const EngineOptions& engine, const Hosts& hosts);

  /// Collective: the layer takes the cache, in one exchange; the prefill's memory goes.
  template <class Layer>
  void hand_over(Layer& layer) {
    const HandOver done = layer.take(prefill_->rows(), options_.context);
    prefill_.reset();
    sum(done);
  }

  const std::optional<DecodeVerdict>& verdict() const { return verdict_; }
  /// For reports, once the cache is handed over: the slowest rank's seconds, the bytes of all.
  const nlohmann::json& json() const { return json_; }
  std::string text() const;

 private:
  void sum(const HandOver& done);

  comm::Communicator& world_;
  const DecodeOptions& options_;
  std::optional<LatentPrefill<comm::Communicator>> prefill_;
  LatentTimes times_;
  std::optional<DecodeVerdict> verdict_;
  nlohmann::json json_;
};

}  // namespace dattn
