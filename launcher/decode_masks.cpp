#include "launcher/decode_masks.hpp"

#include <fmt/format.h>

#include <map>

#include "launcher/head_masks.hpp"
#include "launcher/mask_files.hpp"
#include "launcher/values.hpp"

namespace dattn {

namespace po = boost::program_options;

po::options_description decode_mask_options() {
  po::options_description options("What tokens see (GQA)");
  options.add_options()  //
      ("mask", po::value<std::string>()->default_value("causal"),
       "what a token sees of those before it in its sequence, e.g. stream:sink=64,recent=256 (see "
       "dattn list); the cache keeps what tokens to come may see")  //
      ("head-masks", po::value<std::string>(),
       "instead of --mask: JSON file that gives heads masks of their own (see README)")  //
      ("layer", po::value<Count>(), "which layer of --head-masks, if it has layers");
  return options;
}

std::vector<std::string> read_decode_masks(const po::variables_map& values, DecodeOptions& o) {
  const std::string file = file_name(values, "head-masks");
  const bool given = !values["mask"].defaulted();
  std::optional<Index> layer;
  if (values.count("layer") != 0) layer = values["layer"].as<Count>().value;
  if (o.latent && (given || !file.empty())) {
    throw Failure(Exit::usage,
                  fmt::format("--{}: latent attention is causal in dattn decode; leave "
                              "it out, or --model, --kv-rank and --weights",
                              given ? "mask" : "head-masks"));
  }
  if (!file.empty() && given) {
    throw Failure(Exit::usage, "--mask and --head-masks: give one of the two");
  }
  if (!o.decoding.prefixes.empty() && (given || !file.empty())) {
    throw Failure(Exit::usage, fmt::format("--{}: sequences that share prefixes see all before "
                                           "them; leave it out, or --prefix-tree",
                                           given ? "mask" : "head-masks"));
  }
  if (file.empty() && layer) {
    throw Failure(Exit::usage, "--layer: picks from --head-masks, which is not there");
  }
  const Decoding& d = o.decoding;
  const auto shape = [&](Index tokens) {
    return Shape{tokens, tokens, d.query_heads, d.key_heads, d.value_heads, d.d_qk, d.d_v};
  };
  const std::string words = file.empty() ? values["mask"].as<std::string>()
                                         : read_head_masks(file, layer, shape(d.capacity.front()));
  o.mask = words;
  std::vector<std::string> paths{file};
  if (words == "causal" || words == "full") return paths;
  const std::string option =
      file.empty() ? "--mask '" + words + "'" : "--head-masks " + quoted_path(file);
  MaskFiles files;
  const auto open = [&](const std::string& path) { return files.open(path); };
  std::map<Index, MaskPtr> known;  // by capacity
  std::vector<MaskPtr> masks;
  for (const Index tokens : d.capacity) {
    try {
      if (implied_lengths(words)) {
        throw Failure(Exit::usage, option +
                                       ": is of a whole batch, where a mask here is of each "
                                       "sequence; --context and --batch say what there is");
      }
      const auto [at, is_new] = known.try_emplace(tokens);
      if (is_new) at->second = parse_mask(words, shape(tokens), open);
      masks.push_back(at->second);
    } catch (const BadMaskNumbers& e) {
      throw Failure(Exit::input, option + ": " + e.what());
    } catch (const std::invalid_argument& e) {
      throw Failure(file.empty() ? Exit::usage : Exit::input,
                    fmt::format("{}: for a sequence of {} tokens, the new ones counted: {}", option,
                                tokens, e.what()));
    }
  }
  o.decoding.masks = std::move(masks);
  o.mask_sum = files.sum();
  paths.insert(paths.end(), files.paths().begin(), files.paths().end());
  return paths;
}

}  // namespace dattn
