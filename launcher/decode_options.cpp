#include "launcher/decode_options.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "kernels/isa.hpp"
#include "launcher/decode_masks.hpp"
#include "launcher/digests.hpp"
#include "launcher/output_file.hpp"
#include "launcher/rank_speeds.hpp"
#include "launcher/values.hpp"
#include "launcher/watch.hpp"
#include "parallel/latent_values.hpp"

namespace dattn {

namespace po = boost::program_options;

namespace {

constexpr std::string_view kLatent = "latent-";

Index positive(const po::variables_map& values, const char* name, Index otherwise) {
  return values.count(name) != 0 ? values[name].as<Positive>().value : otherwise;
}

/// The files of --weights, if it is given: they say what other options say of a layer.
std::shared_ptr<const LatentFiles> weights_of(const po::variables_map& values) {
  const std::string prefix = file_name(values, "weights");
  if (prefix.empty()) return nullptr;
  for (const char* name : {"model", "hidden", "heads", "q-rank", "kv-rank", "nope-dim", "rope-dim",
                           "v-dim", "kv-heads", "head-dim", "value-dim", "spectrum", "scale",
                           "soft-cap", "alibi", "relative-bias", "sinks"}) {
    if (values.count(name) == 0 || values[name].defaulted()) continue;
    throw Failure(Exit::usage,
                  fmt::format("--{}: the files of --weights say it, so leave it out", name));
  }
  return std::make_shared<const LatentFiles>("--weights", prefix);
}

std::optional<LatentSizes> latent_of(const po::variables_map& values) {
  if (values.count("model") == 0 && values.count("kv-rank") == 0) {
    for (const char* name : {"hidden", "q-rank", "nope-dim", "rope-dim", "v-dim"}) {
      if (values.count(name) == 0) continue;
      throw Failure(
          Exit::usage,
          fmt::format("--{}: is of latent attention; give --model, --kv-rank or --weights too",
                      name));
    }
    return std::nullopt;
  }
  for (const char* name : {"kv-heads", "head-dim", "value-dim", "scale", "soft-cap", "alibi",
                           "relative-bias", "sinks"}) {
    if (values.count(name) == 0) continue;
    throw Failure(Exit::usage,
                  fmt::format("--{}: latent attention has none; leave it out, or leave "
                              "--model and --kv-rank out",
                              name));
  }
  LatentSizes sizes;
  if (values.count("model") != 0) {
    const auto models = latent_models();
    sizes = std::find_if(models.begin(), models.end(), [&](const LatentModel& m) {
              return m.name == values["model"].as<std::string>();
            })->sizes;
  } else if (values.count("hidden") == 0) {
    throw Failure(Exit::usage, "--kv-rank: latent attention wants --hidden too, or --model");
  }
  sizes.model = positive(values, "hidden", sizes.model);
  sizes.heads = positive(values, "heads", sizes.heads);
  if (values.count("q-rank") != 0) sizes.q_rank = values["q-rank"].as<Count>().value;
  sizes.kv_rank = positive(values, "kv-rank", sizes.kv_rank);
  sizes.d_nope = positive(values, "nope-dim", sizes.d_nope);
  sizes.d_rope = positive(values, "rope-dim", sizes.d_rope);
  sizes.d_v = positive(values, "v-dim", sizes.d_v);
  if (const auto why = complaint(sizes)) throw Failure(Exit::usage, "latent sizes: " + *why);
  return sizes;
}

/// The fewest slices, two or more, into which so many ranks can cut a latent: the more there are,
/// the further TPLA is off. One rank cuts nothing.
int fewest_slices(int ranks) {
  int slices = std::min(ranks, 2);
  while (slices < ranks && ranks % slices != 0) ++slices;
  return slices;
}

Slicing slicing_of(const po::variables_map& values, bool exact, int ranks) {
  const int otherwise = exact ? ranks : fewest_slices(ranks);
  Slicing slicing{.slices = at_most("slices", positive(values, "slices", otherwise), 65536),
                  .exact = exact};
  const std::string& basis = values["basis"].as<std::string>();
  slicing.basis = basis == "pca"        ? Slicing::Basis::pca
                  : basis == "hadamard" ? Slicing::Basis::hadamard
                                        : Slicing::Basis::none;
  slicing.norm =
      values["norm"].as<std::string>() == "slice" ? Slicing::Norm::slice : Slicing::Norm::exact;
  const std::string& factor = values["factor"].as<std::string>();
  slicing.factor = factor == "one"      ? Slicing::Factor::one
                   : factor == "energy" ? Slicing::Factor::energy
                                        : Slicing::Factor::fitted;
  return slicing;
}

std::vector<Index> context_of(const po::variables_map& values) {
  const std::string& text = values["context"].as<std::string>();
  std::vector<Index> context;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    try {
      context.push_back(parse_count(text.substr(at, end - at), 0));
    } catch (const BadValue& e) {
      throw Failure(Exit::usage, "--context: " + e.complaint);
    }
    at = end + 1;
  }
  // What is summed up of these must not overflow before the shape is checked.
  constexpr Index kMostTokens = Index{1} << 40;
  for (const Index tokens : context) {
    if (tokens > kMostTokens) {
      throw Failure(Exit::usage, fmt::format("--context: at most {}, not {}", kMostTokens, tokens));
    }
  }
  const Index batch = positive(values, "batch", static_cast<Index>(context.size()));
  constexpr Index kMost = 1 << 20;
  if (batch > kMost)
    throw Failure(Exit::usage, fmt::format("--batch: at most {}, not {}", kMost, batch));
  if (context.size() == 1) context.resize(static_cast<std::size_t>(batch), context.front());
  if (static_cast<Index>(context.size()) != batch) {
    throw Failure(Exit::usage,
                  fmt::format("--context: {} lengths for a batch of {}; give one, or as many",
                              context.size(), batch));
  }
  return context;
}

/// The tree of --prefix-tree, if it is given. Without --context it says `context`, too: what
/// sequences have of their own.
PrefixTree tree_of(const po::variables_map& values, std::vector<Index>& context) {
  if (values.count("prefix-tree") == 0) return {};
  const std::string& words = values["prefix-tree"].as<std::string>();
  const bool says_context = words.find("suffix=") != std::string::npos;
  if (says_context && !values["context"].defaulted()) {
    throw Failure(Exit::usage,
                  "--prefix-tree: suffix and --context say the same; leave one of them out");
  }
  try {
    Settings settings(words, "levels=GxL:GxL,sizes=AxB:CxDxE,suffix=S,longest=S,seed=1",
                      "the tree");
    PrefixTree tree = read_prefix_tree(settings, static_cast<Index>(context.size()), 0, 0);
    settings.done();
    if (tree.levels.empty()) settings.fail("levels is not set");
    if (values["context"].defaulted()) context = tree.suffixes;
    return tree;
  } catch (const std::invalid_argument& e) {
    throw Failure(Exit::usage, std::string("--prefix-tree: ") + e.what());
  }
}

/// The heads of generated inputs or of files, where `capacity` is what the sequences may reach.
Decoding decoding_of(const po::variables_map& values, const std::optional<Source>& files,
                     std::vector<Index> capacity, const PrefixTree& tree, Index each, Type type) {
  if (files) {
    const Shape& shape = files->shape();
    const Index tokens = std::accumulate(capacity.begin(), capacity.end(), tree.shared());
    if (shape.queries != tokens || shape.keys != tokens) {
      throw Failure(
          Exit::input,
          fmt::format(
              "--q, --k, --v: {} tokens of Q and {} of K and V, where {}the {} of --context "
              "and the new ones of --steps and --warmup are {}; the files have them all, "
              "sequence after sequence",
              shape.queries, shape.keys, tree.levels.empty() ? "" : "those of --prefix-tree, ",
              capacity.size() == 1 ? "sequence" : std::to_string(capacity.size()) + " sequences",
              tokens));
    }
    return {.capacity = std::move(capacity),
            .queries = each,
            .query_heads = shape.query_heads,
            .key_heads = shape.key_heads,
            .value_heads = shape.value_heads,
            .d_qk = shape.d_qk,
            .d_v = shape.d_v,
            .type = type,
            .prefixes = tree.levels};
  }
  const Index kv_heads = positive(values, "kv-heads", 8);
  const Index dim = positive(values, "head-dim", 128);
  return {.capacity = std::move(capacity),
          .queries = each,
          .query_heads = positive(values, "heads", 32),
          .key_heads = kv_heads,
          .value_heads = kv_heads,
          .d_qk = dim,
          .d_v = positive(values, "value-dim", dim),
          .type = type,
          .prefixes = tree.levels};
}

/// Hidden states, if a file has them: of all tokens that come to be in the cache.
std::shared_ptr<const NpyReader> hidden_of(const po::variables_map& values,
                                           const std::optional<LatentSizes>& latent,
                                           std::span<const Index> capacity,
                                           const PrefixTree& tree) {
  const std::string name = file_name(values, "x");
  if (name.empty()) return nullptr;
  if (!latent) {
    throw Failure(Exit::usage,
                  "--x: is of latent attention; give --model, --kv-rank or --weights too");
  }
  auto file = std::make_shared<const NpyReader>(name);
  const auto& shape = file->header().shape;
  const auto fail = [&](const std::string& why) {
    throw Failure(Exit::input, fmt::format("--x: {} {}", quoted_path(name), why));
  };
  if (shape.size() != 2) {
    fail(fmt::format("has {} dimensions; it must have two, [tokens, hidden]", shape.size()));
  }
  if (shape[1] != latent->model) {
    fail(fmt::format("has {} numbers a token where the layer has {}", shape[1], latent->model));
  }
  const Index tokens = std::accumulate(capacity.begin(), capacity.end(), tree.shared());
  if (shape[0] != tokens) {
    fail(fmt::format(
        "has {} tokens, where {}the {} of --context and the new ones of --steps and "
        "--warmup are {}; it has them all, sequence after sequence",
        shape[0], tree.levels.empty() ? "" : "those of --prefix-tree, ",
        capacity.size() == 1 ? "sequence" : std::to_string(capacity.size()) + " sequences",
        tokens));
  }
  return file;
}

/// Where W_UV is applied by a layer whose steps have so many rows.
Values values_of(const po::variables_map& values, const DecodeOptions& o, Index rows, int ranks) {
  const std::string& asked = values["values"].as<std::string>();
  const bool has_choice = o.latent && o.form != nullptr && o.form->name == "sequence";
  if (asked != "auto" && !has_choice) {
    throw Failure(Exit::usage, "--values: is of --form latent-sequence; leave it out");
  }
  if (!has_choice) return Values::after;
  if (asked == "auto") return fewer_bytes(*o.latent, rows, ranks, o.weight_type);
  return asked == "before" ? Values::before : Values::after;
}

/// Q, K and V, if files have them.
std::optional<Source> files_of(const po::variables_map& values, bool latent) {
  std::vector<std::string> names;
  for (const char* name : {"q", "k", "v"}) {
    if (const std::string file = file_name(values, name); !file.empty()) names.push_back(file);
  }
  if (names.empty()) return std::nullopt;
  if (latent) {
    throw Failure(Exit::usage,
                  "--q, --k, --v: latent attention makes them of hidden states; leave them out "
                  "(see --x), or leave --model, --kv-rank and --weights out");
  }
  if (names.size() < 3) {
    throw Failure(Exit::usage, "--q, --k and --v name three files; give all of them or none");
  }
  for (const char* name : {"heads", "kv-heads", "head-dim", "value-dim"}) {
    if (values.count(name) == 0) continue;
    throw Failure(Exit::usage, fmt::format("--{} is for generated inputs; with --q, --k and --v "
                                           "the files say it, so leave it out",
                                           name));
  }
  return Source::files(names[0], names[1], names[2]);
}

}  // namespace

DecodeOptions read_decode_options(const po::variables_map& values, int ranks) {
  DecodeOptions o;
  o.weights = weights_of(values);
  o.latent = o.weights ? o.weights->sizes() : latent_of(values);
  if (o.weights) o.model = values["weights"].as<std::string>();
  if (values.count("model") != 0) o.model = values["model"].as<std::string>();
  std::string form = values["form"].as<std::string>();
  const bool sliced = form.ends_with("exact") || form.ends_with("tpla");
  const bool is_latent = sliced || form.starts_with(kLatent);
  o.form_name = o.latent && !form.starts_with(kLatent) ? std::string(kLatent) + form : form;
  if (is_latent) {
    if (!o.latent) {
      throw Failure(
          Exit::usage,
          "--form " + form +
              ": is of latent attention; give --model, --weights, or --kv-rank and --hidden");
    }
    if (form.starts_with(kLatent)) form.erase(0, kLatent.size());
  }
  o.form = sliced ? nullptr : find_decode_form(form);
  if (sliced) o.slicing = slicing_of(values, form == "exact", ranks);
  for (const char* name : {"slices", "basis", "norm", "factor", "calibration"}) {
    if (values.count(name) == 0 || values[name].defaulted() || sliced) continue;
    throw Failure(Exit::usage, fmt::format("--{}: is of --form latent-tpla or latent-exact", name));
  }
  o.calibration = values["calibration"].as<Positive>().value;
  o.spectrum = values["spectrum"].as<Finite>().value;
  if (o.spectrum != 0 && !o.latent) {
    throw Failure(Exit::usage, "--spectrum: is of latent attention; give --model or --kv-rank too");
  }
  if (values["weights-dtype"].as<std::string>() == "bf16") o.weight_type = Type::bf16;
  if (o.weight_type == Type::bf16 && !o.latent) {
    throw Failure(Exit::usage,
                  "--weights-dtype: is of latent attention; give --model, --kv-rank or --weights");
  }
  o.context = context_of(values);
  if (values.count("prefix-tree") != 0) o.prefix_tree = values["prefix-tree"].as<std::string>();
  const PrefixTree tree = tree_of(values, o.context);
  o.steps = at_most("steps", values["steps"].as<Positive>().value, 1000000);
  o.warmup = at_most("warmup", values["warmup"].as<Count>().value, 1000000);
  o.threads = at_most("threads", values["threads"].as<Positive>().value, 1024);
  read_watch(values);  // the watchdog has them already; here they are checked
  o.seed = values["seed"].as<Count>().value;
  o.check = values.count("check") != 0;
  o.verify_wire = verifies_wire(values);
  o.drawn = values["cache"].as<std::string>() == "drawn";
  o.prefills = values["cache"].as<std::string>() == "prefill";
  if (o.prefills && !o.latent) {
    throw Failure(Exit::usage,
                  "--cache prefill: is of latent attention; give --model, --kv-rank or --weights");
  }
  if (o.drawn && (!o.latent || o.check)) {
    throw Failure(Exit::usage, "--cache drawn: is of latent attention, without --check");
  }
  o.memory = positive(values, "memory", 0);
  o.hosts = values["hosts"].as<std::string>();
  hosts_from(o.hosts, ranks, {});  // here it is checked
  o.source = files_of(values, o.latent.has_value());
  o.out = file_name(values, "out");
  if (o.out == "-") {
    throw Failure(Exit::usage, "--out: a NumPy file cannot go to standard output; give a file");
  }
  o.lse = file_name(values, "lse");
  if (o.lse == "-") {
    throw Failure(Exit::usage, "--lse: a NumPy file cannot go to standard output; give a file");
  }
  if (!o.lse.empty() && o.slicing && !o.slicing->exact) {
    throw Failure(Exit::usage,
                  "--lse: each slice of latent-tpla has one of its own; take another --form");
  }
  o.json = file_name(values, "json");
  const std::string outputs[] = {o.out, o.lse, o.json};
  for (const std::string& file : outputs) {
    if (!file.empty() && file != "-") refuse_unwritable(file);
  }
  const Index each = at_most("new", values["new"].as<Positive>().value, 1 << 20);
  const Type type = values["dtype"].as<std::string>() == "bf16" ? Type::bf16 : Type::f4;
  std::vector<Index> capacity = o.context;
  for (Index& tokens : capacity) tokens += each * (o.steps + o.warmup);
  o.x = hidden_of(values, o.latent, capacity, tree);
  if (o.x) o.calibration = std::min(o.calibration, o.x->rows());
  o.values = values_of(values, o, static_cast<Index>(capacity.size()) * each, ranks);
  if (o.latent) {
    o.decoding = latent_decoding(*o.latent, std::move(capacity), each, type);
    o.decoding.prefixes = tree.levels;
  } else {
    o.decoding = decoding_of(values, o.source, std::move(capacity), tree, each, type);
  }
  if (const auto why = complaint(o.decoding))
    throw Failure(Exit::usage, "--heads, --kv-heads, --context, --new: " + *why);
  if (const std::string& words = values["rank-speeds"].as<std::string>(); !words.empty()) {
    if (o.latent) {
      throw Failure(Exit::usage,
                    "--rank-speeds: is of GQA; a latent cache is dealt to ranks evenly");
    }
    o.measures_speeds = words == kMeasuredSpeeds;
    if (!o.measures_speeds) o.decoding.speeds = speeds_from(words, ranks);
  }
  std::vector<std::string> inputs = read_decode_masks(values, o);
  if (o.weights) {
    for (const std::string& path : o.weights->paths()) inputs.push_back(path);
  }
  for (const char* name : {"q", "k", "v", "x", "relative-bias"})
    inputs.push_back(file_name(values, name));
  refuse_same_file(inputs, outputs);
  const Decoding& d = o.decoding;
  o.scoring = scoring_of(values, {.query_heads = d.query_heads, .d_qk = d.d_qk}, type);
  if (!o.latent && !o.source) {
    o.source = Source::random(
        {d.keys(), d.keys(), d.query_heads, d.key_heads, d.value_heads, d.d_qk, d.d_v}, o.seed);
  }
  if (o.source && type == Type::bf16) o.source->round_to_bfloat16();
  if (o.slicing && values.count("mesh") != 0) {
    throw Failure(Exit::usage, "--mesh: --slices says how a latent is cut; leave --mesh out");
  }
  if (values.count("mesh") != 0) {
    const auto& extents = values["mesh"].as<MeshSize>().extents;
    if (extents.size() != 2) {
      throw Failure(Exit::usage, "--mesh: two extents, tokens x heads, as in 4x2");
    }
    o.mesh = Mesh{{{"tokens", extents[0]}, {"heads", extents[1]}}};
  }
  try {
    chosen_isa();
  } catch (const std::invalid_argument& e) {  // DATTN_ISA names none
    throw Failure(Exit::usage, e.what() + std::string("; set it to one of these, or unset it"));
  }
  return o;
}

}  // namespace dattn
