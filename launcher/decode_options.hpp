#pragma once

#include "launcher/latent_files.hpp"
#include "launcher/options.hpp"
#include "launcher/program_options_fwd.hpp"
#include "parallel/latent_slices.hpp"

namespace dattn {

/// What `dattn decode` is asked for, checked.
struct DecodeOptions {
  std::optional<LatentSizes> latent;
  Decoding decoding;
  Scoring scoring;
  std::optional<Source> source;                ///< of Q, K and V; none for latent attention
  std::vector<Index> context;                  ///< tokens of each sequence before the first step
  std::string prefix_tree;                     ///< its words; empty: no prefixes
  const Strategy* form = nullptr;              ///< null where `slicing` says how
  std::optional<Slicing> slicing;              ///< of the latent
  std::string form_name;                       ///< as reports have it
  double spectrum = 0;                         ///< of generated weights, see decaying()
  std::shared_ptr<const LatentFiles> weights;  ///< null: generated
  Type weight_type = Type::f4;                 ///< as ranks keep them
  std::shared_ptr<const NpyReader> x;          ///< hidden states; null: generated
  Values values = Values::after;               ///< where W_UV is applied
  bool drawn = false;                          ///< the cache is drawn, not made from hidden states
  bool prefills = false;  ///< the cache is what a prefill over the ranks leaves behind
  Index calibration = 0;  ///< tokens
  std::optional<Mesh> mesh;
  /// --hosts; empty: where the ranks are.
  std::string hosts;
  bool measures_speeds = false;  ///< decoding.speeds are still to be measured
  int steps = 1;
  int warmup = 0;
  int threads = 1;
  std::int64_t seed = 1;
  bool check = false;
  bool verify_wire = false;
  Index memory = 0;
  std::string out;
  std::string lse;
  std::string json;
  std::string model = "none";  ///< whose sizes these are, or the prefix of the weights' files

  std::string mask = "causal";  ///< its words
  std::string mask_sum;         ///< of the numbers in files that it names
};

boost::program_options::options_description decode_options();

/// For a job of so many ranks. Failure(usage, input or output) if the options contradict each other
/// or the files, or cannot be.
DecodeOptions read_decode_options(const boost::program_options::variables_map& values, int ranks);

}  // namespace dattn
