// dattn convert: the weights of a GQA layer as weights of latent attention (TransMLA).
#include "kernels/latent/convert.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>

#include "kernels/latent/reference.hpp"
#include "kernels/random.hpp"
#include "launcher/commands.hpp"
#include "launcher/host.hpp"
#include "launcher/latent_files.hpp"
#include "launcher/npy.hpp"
#include "launcher/options.hpp"
#include "launcher/output_file.hpp"
#include "launcher/report.hpp"
#include "launcher/values.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;

/// Bound of the steps that change nothing but rounding.
constexpr double kExact = 1e-5;

po::options_description convert_options() {
  po::options_description options(
      "dattn convert: GQA weights as weights of latent attention (MLA), by TransMLA; one process, "
      "no ranks");
  po::options_description from("GQA layer");
  from.add_options()  //
      ("q-proj", po::value<std::string>(),
       "W_Q as checkpoints have it [heads * head dim, hidden], a NumPy file (f2, f4, f8)")       //
      ("k-proj", po::value<std::string>(), "W_K [kv heads * head dim, hidden]")                  //
      ("v-proj", po::value<std::string>(), "W_V [kv heads * head dim, hidden]")                  //
      ("o-proj", po::value<std::string>(), "W_O [hidden, heads * head dim]")                     //
      ("heads", po::value<Positive>()->default_value({32}), "query heads")                       //
      ("kv-heads", po::value<Positive>()->default_value({8}), "key and value heads")             //
      ("hidden", po::value<Positive>(), "generated weights: numbers of a token [4096]")          //
      ("head-dim", po::value<Positive>(), "generated weights: numbers a head [128]")             //
      ("rope-base", po::value<Finite>()->default_value({10000}), "of the layer's RoPE (theta)")  //
      ("pairs", word({"halves", "neighbours"})->default_value("halves"),
       "which numbers of a head RoPE turns together: x[i], x[i + d/2] or x[2i], x[2i + 1]")  //
      ("seed", po::value<Count>()->default_value({1}), "of what is generated");
  po::options_description to("Latent layer");
  to.add_options()                                                                     //
      ("kv-rank", po::value<Positive>()->default_value({512}), "numbers of a latent")  //
      ("rope-dim", po::value<Positive>()->default_value({64}),
       "numbers of the key with position: a divisor of the head dim, or a multiple up to "
       "kv heads * head dim, where nothing is lost")  //
      ("freqfold", po::value<Count>()->default_value({0}),
       "frequencies taken as one; 0: as few as --rope-dim allows")  //
      ("balance", po::value<Finite>()->default_value({1}),
       "weight of keys over values where the latent is cut");
  po::options_description work("Conversion");
  work.add_options()  //
      ("calibration", po::value<std::string>()->default_value("random"),
       "tokens as they enter the layer [tokens, hidden], a NumPy file; or random")            //
      ("tokens", po::value<Positive>(), "of --calibration random, held-out ones too [1024]")  //
      ("held-out", po::value<Positive>()->default_value({64}),
       "the last tokens, which only the errors are measured on, as one sequence")  //
      ("out", po::value<std::string>(),
       "write PREFIX.json and PREFIX.NAME.npy for down_kv, "
       "kv_gamma, up_q, up_k, up_v, out")                                                     //
      ("json", po::value<std::string>(), "write the report as JSON [- for standard output]")  //
      ("help", "this text");
  options.add(from).add(to).add(work);
  return options;
}

/// A NumPy file of a matrix, looked at but not yet read.
class Matrix {
 public:
  Matrix(const po::variables_map& values, const char* option)
      : option_(option), file_(file_name(values, option)) {
    if (file_.header().shape.size() != 2) {
      fail(fmt::format("has {} dimensions; it must have two", file_.header().shape.size()));
    }
    if (rows() < 1 || columns() < 1) fail("is empty; both extents must be at least 1");
  }

  Index rows() const { return file_.header().shape[0]; }
  Index columns() const { return file_.header().shape[1]; }

  [[noreturn]] void fail(const std::string& what) const {
    throw Failure(Exit::input,
                  fmt::format("--{}: {} {}", option_, quoted_path(file_.path()), what));
  }

  void require(Index rows_wanted, Index columns_wanted, const char* why) const {
    if (rows() == rows_wanted && columns() == columns_wanted) return;
    fail(fmt::format("is [{}, {}]; it must be [{}, {}] ({})", rows(), columns(), rows_wanted,
                     columns_wanted, why));
  }

  std::vector<float> read() const {
    std::vector<float> out(static_cast<std::size_t>(rows() * columns()));
    file_.read_rows(0, rows(), 1, out.data());
    return out;
  }

  /// [columns, rows]: what multiplies from the right.
  std::vector<float> read_transposed() const {
    std::vector<float> out(static_cast<std::size_t>(rows() * columns()));
    std::vector<float> row(static_cast<std::size_t>(columns()));
    for (Index r = 0; r < rows(); ++r) {
      file_.read_rows(r, 1, 1, row.data());
      for (Index c = 0; c < columns(); ++c) {
        out[static_cast<std::size_t>(c * rows() + r)] = row[static_cast<std::size_t>(c)];
      }
    }
    return out;
  }

 private:
  const char* option_;
  NpyReader file_;
};

/// What the options ask for, checked; nothing large is read or made yet.
class Wanted {
 public:
  explicit Wanted(const po::variables_map& values) : seed_(values["seed"].as<Count>().value) {
    sizes.heads = values["heads"].as<Positive>().value;
    sizes.kv_heads = values["kv-heads"].as<Positive>().value;
    sizes.rope_base = values["rope-base"].as<Finite>().value;
    sizes.pairs =
        values["pairs"].as<std::string>() == "halves" ? RopePairs::halves : RopePairs::neighbours;
    find_weights(values);
    conversion = {.kv_rank = values["kv-rank"].as<Positive>().value,
                  .d_rope = values["rope-dim"].as<Positive>().value,
                  .fold = values["freqfold"].as<Count>().value,
                  .balance = values["balance"].as<Finite>().value};
    if (const auto why = complaint(sizes)) {
      throw Failure(Exit::usage, "--heads, --kv-heads, --hidden, --head-dim, --rope-base: " + *why);
    }
    if (const auto why = complaint(sizes, conversion)) {
      throw Failure(Exit::usage, "--kv-rank, --rope-dim, --freqfold, --balance: " + *why);
    }
    find_tokens(values);
    json = file_name(values, "json");
    out = file_name(values, "out");
    std::vector<std::string> outputs = out.empty()
                                           ? std::vector<std::string>{}
                                           : latent_files(out, converted_sizes(sizes, conversion));
    for (const std::string& file : outputs) refuse_unwritable(file);
    if (!json.empty() && json != "-") refuse_unwritable(json);
    outputs.push_back(json);
    std::vector<std::string> inputs;
    for (const char* name : {"q-proj", "k-proj", "v-proj", "o-proj"}) {
      inputs.push_back(file_name(values, name));
    }
    if (x_) inputs.push_back(file_name(values, "calibration"));
    refuse_same_file(inputs, outputs);
    check_memory();
  }

  GqaWeights weights() const {
    if (!q_) return random_weights(sizes, seed_);
    return {sizes, q_->read_transposed(), k_->read_transposed(), v_->read_transposed(),
            o_->read_transposed()};
  }

  /// [tokens, hidden]
  std::vector<float> tokens() const {
    if (x_) return x_->read();
    std::vector<float> x(static_cast<std::size_t>(token_count * sizes.model));
    const std::uint64_t stream = mixed(~static_cast<std::uint64_t>(seed_));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(normal(stream, i));
    return x;
  }

  GqaSizes sizes;
  Conversion conversion;
  Index token_count = 0;  ///< held-out ones too
  Index held_out = 0;
  std::string out;   ///< prefix, or empty
  std::string json;  ///< file, "-" or empty

 private:
  void find_weights(const po::variables_map& values) {
    const std::array names{"q-proj", "k-proj", "v-proj", "o-proj"};
    const auto given =
        std::count_if(names.begin(), names.end(), [&](auto n) { return values.count(n) != 0; });
    if (given == 0) {
      sizes.model = values.count("hidden") != 0 ? values["hidden"].as<Positive>().value : 4096;
      sizes.dim = values.count("head-dim") != 0 ? values["head-dim"].as<Positive>().value : 128;
      return;
    }
    if (given != std::ssize(names)) {
      throw Failure(Exit::usage,
                    "--q-proj, --k-proj, --v-proj and --o-proj name four files; give all or none");
    }
    for (const char* name : {"hidden", "head-dim"}) {
      if (values.count(name) == 0) continue;
      throw Failure(Exit::usage, fmt::format("--{}: is for generated weights; the files say it, so "
                                             "leave it out",
                                             name));
    }
    q_.emplace(values, "q-proj");
    k_.emplace(values, "k-proj");
    v_.emplace(values, "v-proj");
    o_.emplace(values, "o-proj");
    sizes.model = q_->columns();
    if (q_->rows() % sizes.heads != 0) {
      q_->fail(fmt::format("has {} rows, which {} heads do not divide; see --heads", q_->rows(),
                           sizes.heads));
    }
    sizes.dim = q_->rows() / sizes.heads;
    const Index keys = sizes.kv_heads * sizes.dim;
    k_->require(keys, sizes.model, "kv heads * head dim, hidden, by --q-proj and --kv-heads");
    v_->require(keys, sizes.model, "kv heads * head dim, hidden, by --q-proj and --kv-heads");
    o_->require(sizes.model, q_->rows(), "hidden, heads * head dim, by --q-proj");
  }

  void find_tokens(const po::variables_map& values) {
    held_out = values["held-out"].as<Positive>().value;
    if (file_name(values, "calibration") == "random") {
      token_count = values.count("tokens") != 0 ? values["tokens"].as<Positive>().value : 1024;
    } else {
      if (values.count("tokens") != 0) {
        throw Failure(Exit::usage, "--tokens: is for --calibration random; leave it out");
      }
      x_.emplace(values, "calibration");
      if (x_->columns() != sizes.model) {
        x_->fail(fmt::format("has {} numbers a token where the layer has {}", x_->columns(),
                             sizes.model));
      }
      token_count = x_->rows();
    }
    if (token_count <= held_out) {
      throw Failure(Exit::usage, fmt::format("--held-out: {} of {} tokens leave none to calibrate "
                                             "with; hold out fewer or give more",
                                             held_out, token_count));
    }
  }

  /// What is held at once, in double for the most part.
  void check_memory() const {
    const auto n = [](Index x) { return static_cast<double>(x); };
    const double keys = n(sizes.kv_heads) * n(sizes.dim);
    const double queries = n(sizes.heads) * n(sizes.dim);
    const LatentSizes made = converted_sizes(sizes, conversion);
    const double floats = n(sizes.model) * (6 * queries + 6 * keys + n(made.row())) +
                          n(sizes.heads) * (n(sizes.model) * n(made.d_qk()) +
                                            n(made.kv_rank) * n(made.d_nope + made.d_v));
    const double doubles = n(sizes.model) * (2 * queries + 8 * keys + n(made.kv_rank)) +
                           5 * 4 * keys * keys + n(token_count) * (n(sizes.model) + 4 * keys) +
                           n(held_out) * (6 * keys + 4 * queries + n(made.kv_rank));
    const double needs = 4 * (floats + n(token_count) * n(sizes.model)) + 8 * doubles;
    const Index has = available_bytes();
    if (has == 0 || needs <= 0.9 * n(has)) return;
    throw Failure(
        Exit::memory,
        fmt::format("converting needs {} and this host has {}; use a larger one, or fewer "
                    "--tokens",
                    in_bytes(static_cast<Index>(std::min(needs, 0x1p62))), in_bytes(has)));
  }

  std::int64_t seed_;
  std::optional<Matrix> q_, k_, v_, o_, x_;
};

/// What a step, after those before it, does to the output of the layer.
struct StepError {
  std::string name;
  bool exact;  ///< must stay within rounding
  double error;
};

double relative_error(const std::vector<double>& found, const std::vector<double>& expected) {
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

struct Outcome {
  LatentWeights weights;
  std::vector<StepError> steps;
};

Outcome convert(const Wanted& wanted) {
  const GqaWeights weights = with_neighbours(wanted.weights());
  const std::vector<float> tokens = wanted.tokens();
  const GqaSizes& s = weights.sizes;
  const Index fitted = wanted.token_count - wanted.held_out;
  const View<const float> calibration{tokens.data(), fitted, 1, s.model};
  const View<const float> held_out{tokens.data() + fitted * s.model, wanted.held_out, 1, s.model};
  const std::vector<double> y = gqa_reference(weights, held_out, wanted.held_out);
  const auto error = [&](const MergedKeys& keys) {
    return relative_error(merged_reference(weights, keys, held_out, wanted.held_out), y);
  };
  Outcome result;
  const Index fold = fold_of(s, wanted.conversion);
  result.steps.push_back({"merge", true, error(merged_keys(s))});
  MergedKeys keys = concentrated_keys(weights, calibration, 1);
  result.steps.push_back({"RoRoPE", true, error(keys)});
  if (fold > 1) keys = concentrated_keys(weights, calibration, fold);
  result.steps.push_back({fmt::format("FreqFold {}", fold), fold == 1, error(keys)});
  keys = cut_keys(s, std::move(keys), wanted.conversion);
  const bool all_turn = wanted.conversion.d_rope == s.kv_heads * s.dim;
  result.steps.push_back(
      {fmt::format("RoPE on {} of {}", wanted.conversion.d_rope, s.kv_heads * s.dim),
       all_turn && fold == 1, error(keys)});
  result.weights = absorbed_weights(weights, keys, wanted.conversion, calibration);
  const Index whole_rank = 2 * s.kv_heads * s.dim - wanted.conversion.d_rope;
  result.steps.push_back(
      {fmt::format("latent of {} of {}", wanted.conversion.kv_rank, whole_rank),
       all_turn && fold == 1 && wanted.conversion.kv_rank == whole_rank,
       relative_error(latent_reference(result.weights, held_out, wanted.held_out), y)});
  return result;
}

}  // namespace

Exit convert_command(const std::vector<std::string>& given) {
  // Under mpirun one rank does it all.
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  if (rank != nullptr && std::string_view(rank) != "0") return Exit::ok;
  const po::options_description options = convert_options();
  const auto values = parse("dattn convert", options, with_default_files(given));
  if (values.count("help") != 0) return print_help(options);
  const Wanted wanted(values);
  std::optional<Outcome> result;
  try {
    result = convert(wanted);
  } catch (const std::invalid_argument& e) {
    throw Failure(Exit::input, fmt::format("the weights or --calibration: {}", e.what()));
  }
  const bool passed = std::all_of(result->steps.begin(), result->steps.end(), [](const auto& step) {
    return step.exact ? step.error <= kExact : std::isfinite(step.error);
  });
  const LatentSizes& s = result->weights.sizes;
  const Index before = 2 * wanted.sizes.kv_heads * wanted.sizes.dim;
  std::string text =
      fmt::format("GQA {}, {}:{} heads of {} -> MLA d_nope {}, d_rope {}, d_v {}, kv rank {}\n",
                  wanted.sizes.model, wanted.sizes.heads, wanted.sizes.kv_heads, wanted.sizes.dim,
                  s.d_nope, s.d_rope, s.d_v, s.kv_rank);
  text += fmt::format("KV cache: {} -> {} numbers a token ({:.3f})\n", before, s.row(),
                      static_cast<double>(s.row()) / static_cast<double>(before));
  text += fmt::format("||Y-Ygqa||/||Ygqa|| of {} held-out tokens, after {} of calibration:\n",
                      wanted.held_out, wanted.token_count - wanted.held_out);
  nlohmann::json steps = nlohmann::json::array();
  for (const StepError& step : result->steps) {
    const std::string verdict = !step.exact            ? ""
                                : step.error <= kExact ? "exact ...... PASSED"
                                                       : "exact ...... FAILED";
    text += fmt::format("  {:<24} {:.3e} {}\n", step.name, step.error, verdict);
    steps.push_back({{"step", step.name}, {"exact", step.exact}, {"error", step.error}});
  }
  if (passed && !wanted.out.empty()) write_latent_files(wanted.out, result->weights);
  if (!wanted.json.empty()) {
    const nlohmann::json j{{"version", 1},
                           {"command", "convert"},
                           {"cache_numbers", nlohmann::json::array({before, s.row()})},
                           {"calibration_tokens", wanted.token_count - wanted.held_out},
                           {"held_out_tokens", wanted.held_out},
                           {"steps", steps},
                           {"passed", passed}};
    write_text_file(wanted.json, j.dump(1) + "\n");
  }
  if (wanted.json != "-") write_text_file("-", text);
  return passed ? Exit::ok : Exit::check_failed;
}

}  // namespace dattn
