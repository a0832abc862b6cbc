// dattn decode: token by token over a KV cache that is sharded once.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>

#include "comm/session.hpp"
#include "kernels/isa.hpp"
#include "launcher/commands.hpp"
#include "launcher/decode_check.hpp"
#include "launcher/host.hpp"
#include "launcher/memory.hpp"
#include "launcher/output_file.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;

constexpr std::string_view kLatent = "latent-";

std::vector<std::string> form_names() {
  std::vector<std::string> names;
  for (const Strategy& form : decode_forms()) names.emplace_back(form.name);
  for (const Strategy& form : decode_forms())
    names.push_back(std::string(kLatent) + std::string(form.name));
  return names;
}

std::vector<std::string> model_names() {
  std::vector<std::string> names;
  for (const LatentModel& model : latent_models()) names.emplace_back(model.name);
  return names;
}

po::options_description decode_options() {
  po::options_description options(
      "dattn decode: new tokens against a KV cache over the ranks of an MPI job");
  po::options_description heads("Attention (GQA)");
  heads.add_options()                                                         //
      ("heads", po::value<Positive>(), "query heads [32; a model's own]")     //
      ("kv-heads", po::value<Positive>(), "key and value heads [8]")          //
      ("head-dim", po::value<Positive>(), "numbers a head of Q and K [128]")  //
      ("value-dim", po::value<Positive>(), "numbers a head of V [as --head-dim]");
  po::options_description latent("Latent attention (MLA); --model or --kv-rank asks for it");
  latent.add_options()                                                                            //
      ("model", word(model_names()), "the layer sizes of this model; what follows changes some")  //
      ("hidden", po::value<Positive>(), "numbers of a token as it enters the layer")              //
      ("q-rank", po::value<Count>(), "of compressed queries; 0: not compressed")                  //
      ("kv-rank", po::value<Positive>(), "numbers of a latent")                                   //
      ("nope-dim", po::value<Positive>(), "numbers of a head's query and key without position")   //
      ("rope-dim", po::value<Positive>(), "with position")                                        //
      ("v-dim", po::value<Positive>(), "numbers of a head's value");
  po::options_description work("Decoding");
  work.add_options()  //
      ("form", word(form_names())->default_value("sequence"),
       "how ranks share it (see dattn list); latent-NAME is NAME for latent attention")           //
      ("mesh", po::value<MeshSize>(), "extents of the mesh, tokens x heads, e.g. 4x2 for helix")  //
      ("context", po::value<std::string>()->default_value("4K"),
       "tokens in the cache before the first step: of all sequences, or n1,n2,... of each")     //
      ("batch", po::value<Positive>(), "sequences [1, or as many as --context has]")            //
      ("new", po::value<Positive>()->default_value({1}), "new tokens of a sequence in a step")  //
      ("steps", po::value<Positive>()->default_value({8}), "timed steps")                       //
      ("warmup", po::value<Count>()->default_value({1}), "steps before those")                  //
      ("dtype", word({"f4", "bf16"})->default_value("f4"), "of cache and queries")              //
      ("seed", po::value<Count>()->default_value({1}), "which numbers")                         //
      ("threads", po::value<Positive>()->default_value({1}), "OpenMP threads a rank")           //
      ("check", "compare the last step with attention, or the whole layer, in double")          //
      ("memory", po::value<Positive>(),
       "bytes that a rank may use, e.g. 8G [what its host has, in equal shares]")  //
      ("timeout", po::value<Positive>()->default_value({300}),
       "seconds that a rank waits for others before it ends the job")                         //
      ("json", po::value<std::string>(), "write the report as JSON [- for standard output]")  //
      ("help", "this text");
  options.add(heads).add(latent).add(work);
  return options;
}

struct DecodeOptions {
  std::optional<LatentSizes> latent;
  Decoding decoding;
  std::vector<Index> context;  ///< tokens of each sequence before the first step
  const Strategy* form = nullptr;
  std::optional<Mesh> mesh;
  int steps = 1;
  int warmup = 0;
  int threads = 1;
  int timeout = 300;
  std::int64_t seed = 1;
  bool check = false;
  Index memory = 0;
  std::string json;
  std::string model = "none";
};

Index positive(const po::variables_map& values, const char* name, Index otherwise) {
  return values.count(name) != 0 ? values[name].as<Positive>().value : otherwise;
}

std::optional<LatentSizes> latent_of(const po::variables_map& values) {
  if (values.count("model") == 0 && values.count("kv-rank") == 0) {
    for (const char* name : {"hidden", "q-rank", "nope-dim", "rope-dim", "v-dim"}) {
      if (values.count(name) == 0) continue;
      throw Failure(
          Exit::usage,
          fmt::format("--{}: is of latent attention; give --model or --kv-rank too", name));
    }
    return std::nullopt;
  }
  for (const char* name : {"kv-heads", "head-dim", "value-dim"}) {
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

DecodeOptions read_options(const po::variables_map& values) {
  DecodeOptions o;
  o.latent = latent_of(values);
  if (values.count("model") != 0) o.model = values["model"].as<std::string>();
  std::string form = values["form"].as<std::string>();
  if (form.starts_with(kLatent)) {
    if (!o.latent) {
      throw Failure(
          Exit::usage,
          "--form " + form + ": is of latent attention; give --model, or --kv-rank and --hidden");
    }
    form.erase(0, kLatent.size());
  }
  o.form = find_decode_form(form);
  o.context = context_of(values);
  o.steps = at_most("steps", values["steps"].as<Positive>().value, 1000000);
  o.warmup = at_most("warmup", values["warmup"].as<Count>().value, 1000000);
  o.threads = at_most("threads", values["threads"].as<Positive>().value, 1024);
  o.timeout = at_most("timeout", values["timeout"].as<Positive>().value, 1000000);
  o.seed = values["seed"].as<Count>().value;
  o.check = values.count("check") != 0;
  o.memory = positive(values, "memory", 0);
  o.json = file_name(values, "json");
  if (!o.json.empty() && o.json != "-") refuse_unwritable(o.json);
  const Index each = values["new"].as<Positive>().value;
  const Type type = values["dtype"].as<std::string>() == "bf16" ? Type::bf16 : Type::f4;
  std::vector<Index> capacity = o.context;
  for (Index& tokens : capacity) tokens += each * (o.steps + o.warmup);
  if (o.latent) {
    o.decoding = latent_decoding(*o.latent, std::move(capacity), each, type);
  } else {
    const Index kv_heads = positive(values, "kv-heads", 8);
    const Index dim = positive(values, "head-dim", 128);
    o.decoding = {.capacity = std::move(capacity),
                  .queries = each,
                  .query_heads = positive(values, "heads", 32),
                  .key_heads = kv_heads,
                  .value_heads = kv_heads,
                  .d_qk = dim,
                  .d_v = positive(values, "value-dim", dim),
                  .type = type};
  }
  if (const auto why = complaint(o.decoding))
    throw Failure(Exit::usage, "--heads, --kv-heads, --context, --new: " + *why);
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

/// One step on one rank.
struct Step {
  double seconds, project, compute, wait, reduce;
};

/// Decodes, on every rank.
class DecodeJob {
 public:
  DecodeJob(Communicator& world, const DecodeOptions& options) : world_(world), o_(options) {}

  Exit run() {
    settle();
    const EngineOptions engine{
        .score = {.scale = 1 / std::sqrt(static_cast<double>(o_.decoding.d_qk))},
        .threads = o_.threads};
    if (o_.latent) {
      std::optional<LatentDecoder<Communicator>> layer;
      together(world_, [&] {
        layer.emplace(*o_.latent, o_.seed, o_.decoding, *o_.form, mesh_, world_, engine);
      });
      return decode_latent(*layer);
    }
    std::optional<Decoder<Communicator>> decoder;
    together(world_, [&] { decoder.emplace(o_.decoding, *o_.form, mesh_, world_, engine); });
    return decode_heads(*decoder);
  }

 private:
  bool leads() const { return world_.rank() == 0; }
  int turns() const { return o_.warmup + o_.steps; }
  Index rows() const { return o_.decoding.queries * static_cast<Index>(o_.context.size()); }

  /// Mesh and memory, refused before anything is allocated.
  void settle() {
    const Shape shape{1, 1, o_.decoding.query_heads, o_.decoding.key_heads, o_.decoding.value_heads,
                      1, 1};
    mesh_ = o_.mesh ? *o_.mesh : o_.form->mesh(world_.size(), shape);
    RankReport own;
    together(world_, [&] {
      if (mesh_.ranks() != world_.size()) {
        throw Failure(Exit::usage,
                      fmt::format("--mesh: a mesh of {} has {} ranks, but there are {}",
                                  mesh_.text(), mesh_.ranks(), world_.size()));
      }
      const Problem problem = decoding_problem(o_.decoding, mesh_);
      if (const auto why = o_.form->refuses(problem)) {
        throw Failure(Exit::usage, fmt::format("--form: {} {}", o_.form->name, *why));
      }
      own.host = this_host();
      const Program program = o_.form->program(problem, world_.rank());
      needs_ = memory_bytes(program, problem) + kernel_bytes(problem, program, o_.threads);
      if (o_.latent) needs_ += latent_bytes(problem, program);
    });
    std::vector<RankReport> ranks;
    for (const std::string& text : world_.all_gather(encoded(own))) ranks.push_back(decoded(text));
    const Index may = o_.memory > 0 ? o_.memory : bytes_a_rank(ranks);
    together(world_, [&] {
      if (may > 0 && needs_ > may) {
        throw Failure(
            Exit::memory,
            fmt::format("{} needs {} on this rank, which has {}; use more hosts, fewer ranks "
                        "on this one, a larger --memory, a smaller --context or --batch, or "
                        "another --form",
                        o_.form->name, in_bytes(needs_), in_bytes(may)));
      }
    });
  }

  /// Weights beside the slots, less V, which lies in K.
  Index latent_bytes(const Problem& problem, const Program& program) const {
    const LatentSizes& s = *o_.latent;
    const auto block = [&](SlotId slot) -> const Block& {
      return program.slots[static_cast<std::size_t>(slot)].block;
    };
    const Index heads = std::max(block(program.input(Kind::Q)).head_count(),
                                 program.result(Kind::O).block.head_count());
    const Index numbers =
        s.model * (s.q_rank + s.row()) +
        heads * (s.q_width() * s.d_qk() + s.kv_rank * (s.d_nope + s.d_v) + s.d_v * s.model);
    return numbers * static_cast<Index>(sizeof(float)) -
           bytes_of(block(program.input(Kind::V)), problem.shape(), problem.type());
  }

  Exit decode_latent(LatentDecoder<Communicator>& layer) {
    const Hidden hidden = hidden_states(o_.latent->model, o_.decoding, o_.seed);
    const Index each = o_.decoding.queries;
    const Index model = o_.latent->model;
    std::vector<Index> lengths = o_.context;
    layer.fill(lengths, hidden);
    std::vector<float> x(static_cast<std::size_t>(rows() * model));
    std::vector<float> y(x.size());
    for (int turn = 0; turn < turns(); ++turn) {
      for (std::size_t s = 0; s < lengths.size(); ++s) {
        hidden(s, {{lengths[s], each, 1}}, &x[s * static_cast<std::size_t>(each * model)]);
        lengths[s] += each;
      }
      world_.barrier();
      const LatentTimes t = layer.step(lengths, {x.data(), rows(), 1, model}, y);
      note(turn, {t.seconds, t.project, t.attention.compute, t.attention.wait, t.reduce},
           t.bytes_sent, t.messages);
    }
    if (o_.check)
      verdict_ =
          check_latent(world_, layer.weights().sizes, o_.seed, o_.decoding, lengths, hidden, y);
    return report(layer.decoder(), lengths);
  }

  Exit decode_heads(Decoder<Communicator>& decoder) {
    const DecodeTensors tensors(o_.decoding, o_.seed);
    std::vector<Index> lengths = o_.context;
    for (std::size_t s = 0; s < lengths.size(); ++s) tensors.append(decoder, s, {0, lengths[s]});
    for (int turn = 0; turn < turns(); ++turn) {
      std::vector<Index> before = lengths;
      for (std::size_t s = 0; s < lengths.size(); ++s) {
        lengths[s] += o_.decoding.queries;
        tensors.append(decoder, s, {before[s], lengths[s]});
      }
      tensors.ask(decoder, lengths);
      world_.barrier();
      const RunTimes t = decoder.step(lengths);
      note(turn, {t.seconds, 0, t.compute, t.wait, 0}, t.bytes_sent, t.messages);
    }
    if (o_.check) verdict_ = check_heads(world_, decoder, tensors, lengths);
    return report(decoder, lengths);
  }

  void note(int turn, const Step& step, Index bytes, Index messages) {
    if (turn >= o_.warmup) steps_.push_back(step);
    bytes_ = bytes;
    messages_ = messages;
  }

  template <class D>
  Exit report(D& decoder, const std::vector<Index>& lengths) {
    // A step is as long as its slowest rank's.
    std::vector<double> seconds, phases(4, 0);
    for (const Step& s : steps_) seconds.push_back(s.seconds);
    world_.all_reduce_max(seconds);
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2];
    const double p95 = seconds[std::min(seconds.size() - 1, seconds.size() * 95 / 100)];
    const auto middle = [&](double Step::*phase) {
      std::vector<double> all;
      for (const Step& s : steps_) all.push_back(s.*phase);
      std::nth_element(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(all.size() / 2),
                       all.end());
      return all[all.size() / 2];
    };
    phases = {middle(&Step::project), middle(&Step::compute), middle(&Step::wait),
              middle(&Step::reduce)};
    world_.all_reduce_max(phases);
    const Index cached = decoder.cache().bytes(lengths, o_.decoding);
    std::array<std::int64_t, 3> sums{cached, bytes_, messages_};
    world_.all_reduce_sum(std::span<std::int64_t>(sums));
    std::array<std::int64_t, 3> most{cached, bytes_, needs_};
    world_.all_reduce_max(std::span<std::int64_t>(most));
    together(world_, [&] {
      if (!leads()) return;
      const double rate = static_cast<double>(rows()) / median;
      const std::string name = (o_.latent ? std::string(kLatent) : "") + std::string(o_.form->name);
      const Index tokens = std::accumulate(lengths.begin(), lengths.end(), Index{0});
      nlohmann::json j{
          {"version", 1},
          {"command", "decode"},
          {"form", name},
          {"model", o_.model},
          {"ranks", world_.size()},
          {"mesh", mesh_.text()},
          {"threads", o_.threads},
          {"isa", chosen_isa().name},
          {"dtype", name_of(o_.decoding.type)},
          {"batch", o_.context.size()},
          {"new_tokens", o_.decoding.queries},
          {"context", o_.context},
          {"steps", o_.steps},
          {"heads", o_.decoding.query_heads},
          {"kv_heads", o_.decoding.key_heads},
          {"d_qk", o_.decoding.d_qk},
          {"d_v", o_.decoding.d_v},
          {"seconds_median", median},
          {"seconds_p95", p95},
          {"tokens_per_second", rate},
          {"project_seconds", phases[0]},
          {"attention_seconds", phases[1]},
          {"wait_seconds", phases[2]},
          {"reduce_seconds", phases[3]},
          {"kv_bytes", sums[0]},
          {"kv_bytes_rank", most[0]},
          {"kv_bytes_token_rank", static_cast<double>(most[0]) / static_cast<double>(tokens)},
          {"memory_bytes_rank", most[2]},
          {"bytes_step", sums[1]},
          {"messages_step", sums[2]}};
      if (verdict_)
        j["check"] = {
            {"error", verdict_->error}, {"bound", verdict_->bound}, {"passed", verdict_->passed()}};
      std::string text = fmt::format(
          "decode: {} over {} ranks (mesh {}), {} sequences, {} new tokens a step, {} tokens "
          "cached, {}, "
          "kernels for {}; proved\n",
          name, world_.size(), mesh_.text(), o_.context.size(), o_.decoding.queries, tokens,
          name_of(o_.decoding.type), chosen_isa().name);
      text += fmt::format("step: median {:.6f} s of {} (p95 {:.6f}); {:.1f} tokens/s\n", median,
                          o_.steps, p95, rate);
      text += fmt::format(
          "slowest rank's medians: projections {:.6f}, attention {:.6f}, exposed wait {:.6f}, "
          "all-reduce of y {:.6f} s\n",
          phases[0], phases[1], phases[2], phases[3]);
      text += fmt::format(
          "KV cache: {} of all ranks, at most {} on a rank, {:.1f} bytes a token there; a step "
          "sends {} in {} messages\n",
          in_bytes(sums[0]), in_bytes(most[0]),
          static_cast<double>(most[0]) / static_cast<double>(tokens), in_bytes(sums[1]), sums[2]);
      if (verdict_) {
        text += fmt::format(
            "check: {} of the last step, ||X-Xref||/||Xref|| = {:.3e} (bound {:.0e}) ...... {}\n",
            o_.latent ? "the layer's y" : "O", verdict_->error, verdict_->bound,
            verdict_->passed() ? "PASSED" : "FAILED");
      }
      if (!o_.json.empty()) write_text_file(o_.json, j.dump(1) + "\n");
      if (o_.json != "-") write_text_file("-", text);
    });
    return !verdict_ || verdict_->passed() ? Exit::ok : Exit::check_failed;
  }

  Communicator& world_;
  const DecodeOptions& o_;
  Mesh mesh_;
  Index needs_ = 0;
  std::vector<Step> steps_;
  Index bytes_ = 0;
  Index messages_ = 0;
  std::optional<DecodeVerdict> verdict_;
};

}  // namespace

Exit decode_command(const std::vector<std::string>& given) {
  const std::vector<std::string> arguments = with_default_files(given);
  const po::options_description described = decode_options();
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    return print_help(described);
  }
  const std::string command = "dattn decode";
  return on_all_ranks(command, [&](Communicator& world) {
    std::optional<DecodeOptions> options;
    together(world, [&] {
      if (const auto complaint = comm::launch_complaint(
              world.size(), std::getenv("OMPI_COMM_WORLD_SIZE"), std::getenv("SLURM_NTASKS"))) {
        throw Failure(Exit::usage, *complaint);
      }
      options = read_options(parse(command, described, arguments));
    });
    Signature fields{{"instruction set", chosen_isa().name}};
    for (const auto& option : described.options()) {
      const std::string name = "--" + option->long_name();
      fields.emplace_back(name, written(arguments, name));
    }
    try {
      require_agreement(world, fields);
    } catch (const Disagreement& e) {
      if (world.rank() == 0) complain(world.rank(), command, e.what());
      return Exit::usage;
    }
    world.set_deadline(options->timeout);
    return DecodeJob(world, *options).run();
  });
}

}  // namespace dattn
