#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "kernels/score.hpp"
#include "kernels/shape.hpp"
#include "launcher/program_options_fwd.hpp"
#include "launcher/score_files.hpp"

namespace dattn {

/// How scores are made of q.k, and what each row sees beside its keys.
struct Scoring {
  Score score = {};
  /// Attention sinks (gpt-oss): by query head the score of a key whose value is 0; or empty.
  std::vector<float> sinks = {};
  std::string bias_file = {};  ///< what score.bias was read from
  KeyWeightsFile key_weights_file = {};
  std::vector<float> key_weights = {};  ///< what it holds, once a command has read it
  std::string files_sum = {};           ///< over what files held, or empty
};

/// "scale", "soft-cap", "alibi", "relative-bias", "sigmoid" and "sinks".
boost::program_options::options_description score_options();
/// "scale", "soft-cap", "alibi", "relative-bias" and "sinks".
boost::program_options::options_description decode_score_options();

/// "key-weights": for commands that read the file, and solve one problem.
boost::program_options::options_description key_weights_option();

/// What the options of a problem of this shape and type; Failure(usage) if that cannot be.
Scoring scoring_of(const boost::program_options::variables_map& values, const Shape& shape,
                   Type type);

/// Adds to a problem's object, which has "scale", those of the others that there are.
void add_scoring(nlohmann::ordered_json& to, const Scoring& scoring);
void add_scoring(nlohmann::json& to, const Scoring& scoring);

/// For people: ", soft cap 30, ALiBi, sinks" and so on, or nothing.
std::string text(const Scoring& scoring);

}  // namespace dattn
