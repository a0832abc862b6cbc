#include "launcher/scores.hpp"

#include <fmt/format.h>

#include <boost/program_options/value_semantic.hpp>
#include <nlohmann/json.hpp>
#include <cmath>
#include <limits>
#include <string>
#include <string_view>

#include "launcher/failure.hpp"
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

/// Numbers between commas: one for all heads, or one for each query head.
std::vector<float> numbers_of_heads(const char* name, std::string_view text, Index heads) {
  std::vector<float> numbers;
  for (std::string_view rest = text;;) {
    const std::size_t comma = rest.find(',');
    try {
      numbers.push_back(static_cast<float>(parse_finite(rest.substr(0, comma)).value));
    } catch (const BadValue& e) {
      throw Failure(Exit::usage, fmt::format("--{}: {}", name, e.complaint));
    }
    if (!std::isfinite(numbers.back())) {
      throw Failure(Exit::usage, fmt::format("--{}: '{}' is beyond float32, in which scores are",
                                             name, rest.substr(0, comma)));
    }
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
  if (!scoring.sinks.empty()) to["sinks"] = scoring.sinks;
}

void add_cap(po::options_description& options) {
  options.add_options()("soft-cap", po::value<Finite>(),
                        "and then soft-cap * tanh(score / soft-cap), as in Gemma 2 [none]");
}
void add_sinks(po::options_description& options) {
  options.add_options()("sinks", po::value<std::string>(),
                        "each row also sees a key whose value is 0, of this score, as in gpt-oss: "
                        "one for each query head, or one for all [none]");
}

}  // namespace

po::options_description score_options() {
  po::options_description options("Scores");
  options.add_options()("scale", po::value<Finite>(), "scores are scale * q.k [1 / sqrt(dim)]");
  add_cap(options);
  options.add_options()("alibi", po::value<std::string>(),
                        "and then less slope * |key - query|: auto (the published slopes), one "
                        "slope for each query head, or one for all, e.g. 0.5,0.25 [none]");
  add_sinks(options);
  return options;
}

po::options_description decode_score_options() {
  po::options_description options("Scores (q.k / sqrt(head dim))");
  add_cap(options);
  add_sinks(options);
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
  if (!scoring.sinks.empty()) text += ", sinks";
  return text;
}

}  // namespace dattn
