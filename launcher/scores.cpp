#include "launcher/scores.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <boost/program_options/value_semantic.hpp>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "launcher/failure.hpp"
#include "launcher/file_sum.hpp"
#include "launcher/values.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;

/// Slopes of `heads` heads as published (Press et al. 2022): from 2^(-8 / n) on each the next power
/// of the first, n the number of heads; where that is no power of two, those of the power below,
/// and every other one of the power above.
std::vector<float> published_slopes(Index heads) {
  Index n = 1;
  while (2 * n <= heads) n *= 2;
  std::vector<float> slopes;
  const auto power = [](double i, Index of) {
    return static_cast<float>(std::exp2(-8 * i / static_cast<double>(of)));
  };
  for (Index i = 1; i <= n; ++i) slopes.push_back(power(static_cast<double>(i), n));
  for (Index i = 1; std::ssize(slopes) < heads; i += 2) {
    slopes.push_back(power(static_cast<double>(i), 2 * n));
  }
  return slopes;
}

/// A number that float32 has, too.
float number_of(const char* name, std::string_view text) {
  float number = 0;
  try {
    number = static_cast<float>(parse_finite(text).value);
  } catch (const BadValue& e) {
    throw Failure(Exit::usage, fmt::format("--{}: {}", name, e.complaint));
  }
  if (!std::isfinite(number)) {
    throw Failure(Exit::usage,
                  fmt::format("--{}: '{}' is beyond float32, in which scores are", name, text));
  }
  return number;
}

/// Numbers between commas: one for all heads, or one for each query head.
std::vector<float> numbers_of_heads(const char* name, std::string_view text, Index heads) {
  std::vector<float> numbers;
  for (std::string_view rest = text;;) {
    const std::size_t comma = rest.find(',');
    numbers.push_back(number_of(name, rest.substr(0, comma)));
    if (comma == std::string_view::npos) break;
    rest.remove_prefix(comma + 1);
  }
  if (numbers.size() == 1) numbers.resize(static_cast<std::size_t>(heads), numbers.front());
  if (std::ssize(numbers) != heads) {
    throw Failure(Exit::usage,
                  fmt::format("--{}: {} numbers for {} query heads; give one for each, "
                              "or one for all",
                              name, numbers.size(), heads));
  }
  return numbers;
}

template <class Json>
void add_to(Json& to, const Scoring& scoring) {
  if (scoring.score.soft_cap > 0) to["soft_cap"] = scoring.score.soft_cap;
  if (!scoring.score.alibi.empty()) to["alibi"] = scoring.score.alibi;
  if (!scoring.score.bias.empty()) to["relative_bias_reach"] = scoring.score.reach;
  if (scoring.key_weights_file.named()) to["key_weights"] = true;
  if (scoring.score.sigmoid) to["sigmoid"] = scoring.score.shift;
  if (!scoring.sinks.empty()) to["sinks"] = scoring.sinks;
  if (!scoring.files_sum.empty()) to["score_files_sum"] = scoring.files_sum;
}

void add_scale(po::options_description& options) {
  options.add_options()("scale", po::value<Finite>(), "scores are scale * q.k [1 / sqrt(dim)]");
}
void add_cap(po::options_description& options) {
  options.add_options()("soft-cap", po::value<Finite>(),
                        "and then soft-cap * tanh(score / soft-cap), as in Gemma 2 [none]");
}
void add_distances(po::options_description& options) {
  options.add_options()("alibi", po::value<std::string>(),
                        "and then less slope * |key - query|: auto (the published slopes), one "
                        "slope for each query head, or one for all, e.g. 0.5,0.25 [none]");
  options.add_options()(
      "relative-bias", po::value<std::string>(),
      "and then plus a number for each distance key - query, as in T5: NumPy file, "
      "[heads, 2 * reach + 1] or [2 * reach + 1], from -reach to reach; farther "
      "keys have the nearest of these [none]");
}
void add_sinks(po::options_description& options) {
  options.add_options()("sinks", po::value<std::string>(),
                        "each row also sees a key whose value is 0, of this score, as in gpt-oss: "
                        "one for each query head, or one for all [none]");
}

}  // namespace

po::options_description score_options() {
  po::options_description options("Scores");
  add_scale(options);
  add_cap(options);
  add_distances(options);
  options.add_options()("sigmoid", po::value<std::string>(),
                        "a key weighs 1 / (1 + exp(-score - B)), by itself, in place of softmax: "
                        "auto (B is -ln of the number of keys) or B. O is the sum, undivided, LSE "
                        "the logarithm of the sum of weights [softmax]");
  add_sinks(options);
  return options;
}

po::options_description decode_score_options() {
  po::options_description options("Scores");
  add_scale(options);
  add_cap(options);
  add_distances(options);
  add_sinks(options);
  return options;
}

po::options_description key_weights_option() {
  po::options_description options("Keys that stand for several");
  options.add_options()(
      "key-weights", po::value<std::string>(),
      "NumPy file of a number for each key that is added to its scores, [keys] or "
      "[keys, key heads]: ln n for a key that stands for n, -inf for none, as "
      "padding [none]");
  return options;
}

Scoring scoring_of(const po::variables_map& values, const Shape& shape, Type type) {
  Scoring scoring;
  Score& score = scoring.score;
  score.scale = values.count("scale") != 0 ? values["scale"].as<Finite>().value
                                           : 1 / std::sqrt(static_cast<double>(shape.d_qk));
  if (type != Type::f8 && std::abs(score.scale) > std::numeric_limits<float>::max()) {
    throw Failure(Exit::usage, fmt::format("--scale: {} is beyond float32, in which scores are; "
                                           "take a smaller one, or --dtype f8",
                                           score.scale));
  }
  if (values.count("soft-cap") != 0) {
    score.soft_cap = values["soft-cap"].as<Finite>().value;
    constexpr double kLeast = 1e-30;  // its inverse is a float, too
    if (!(score.soft_cap >= kLeast) || score.soft_cap > 1 / kLeast) {
      throw Failure(Exit::usage,
                    fmt::format("--soft-cap: {} is not between {:g} and {:g}; leave it "
                                "out for none",
                                score.soft_cap, kLeast, 1 / kLeast));
    }
  }
  if (values.count("alibi") != 0) {
    const auto& text = values["alibi"].as<std::string>();
    score.alibi = text == "auto" ? published_slopes(shape.query_heads)
                                 : numbers_of_heads("alibi", text, shape.query_heads);
  }
  if (values.count("sigmoid") != 0) {
    const auto& text = values["sigmoid"].as<std::string>();
    score.sigmoid = true;
    score.shift = text == "auto" ? -std::log(static_cast<double>(std::max<Index>(1, shape.keys)))
                                 : number_of("sigmoid", text);
    if (values.count("sinks") != 0) {
      throw Failure(
          Exit::usage,
          "--sinks with --sigmoid: a sink is part of what softmax divides by, and a sigmoid "
          "divides by nothing; leave one of them out");
    }
  }
  FileSum sum;
  const auto file = [&](const char* name) -> std::string {
    return values.count(name) == 0 ? std::string() : values[name].as<std::string>();
  };
  if (scoring.bias_file = file("relative-bias"); !scoring.bias_file.empty()) {
    read_relative_bias(scoring.bias_file, shape, score, sum);
    scoring.files_sum = sum.text();
  }
  if (const std::string weights = file("key-weights"); !weights.empty()) {
    scoring.key_weights_file = KeyWeightsFile(weights, shape);
    scoring.key_weights_file.add_to(sum);
    scoring.files_sum = sum.text();
  }
  if (values.count("sinks") != 0) {
    scoring.sinks = numbers_of_heads("sinks", values["sinks"].as<std::string>(), shape.query_heads);
  }
  return scoring;
}

void add_scoring(nlohmann::ordered_json& to, const Scoring& scoring) { add_to(to, scoring); }
void add_scoring(nlohmann::json& to, const Scoring& scoring) { add_to(to, scoring); }

std::string text(const Scoring& scoring) {
  std::string text;
  if (scoring.score.soft_cap > 0) text += fmt::format(", soft cap {}", scoring.score.soft_cap);
  if (!scoring.score.alibi.empty()) text += ", ALiBi";
  if (!scoring.score.bias.empty()) {
    text += fmt::format(", relative bias up to {}", scoring.score.reach);
  }
  if (scoring.key_weights_file.named()) text += ", key weights";
  if (scoring.score.sigmoid) text += fmt::format(", sigmoid {:+.6g}", scoring.score.shift);
  if (!scoring.sinks.empty()) text += ", sinks";
  return text;
}

}  // namespace dattn
