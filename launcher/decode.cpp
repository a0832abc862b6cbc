// dattn decode: token by token over a KV cache that is sharded once.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "comm/session.hpp"
#include "kernels/isa.hpp"
#include "kernels/latent/basis.hpp"
#include "launcher/commands.hpp"
#include "launcher/decode_check.hpp"
#include "launcher/decode_options.hpp"
#include "launcher/decode_prefill.hpp"
#include "launcher/file_sum.hpp"
#include "launcher/host.hpp"
#include "launcher/links.hpp"
#include "launcher/memory.hpp"
#include "launcher/output_file.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"

namespace dattn {
namespace {

using comm::Communicator;

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
        .threads = o_.threads,
        .verify_wire = o_.verify_wire,
        .progress = noted(world_)};
    const Range all_heads{0, o_.decoding.query_heads};
    world_.phase("plan and weights");
    if (o_.slicing) {
      std::optional<SlicedDecoder<Communicator>> layer;
      std::vector<float> x(static_cast<std::size_t>(o_.calibration * o_.latent->model));
      const View<const float> calibration{x.data(), o_.calibration, 1, o_.latent->model};
      together(world_, [&] {
        if (o_.x) {
          o_.x->read_rows(0, o_.calibration, 1, x.data());
        } else {  // tokens of a sequence that is none of the batch's
          hidden_states(o_.latent->model, o_.decoding, o_.seed + 1)(0, {{0, o_.calibration, 1}},
                                                                    x.data());
        }
      });
      if (o_.prefills) {
        prefill(
            [&] {
              return in_basis(weights()(all_heads), *o_.slicing, calibration,
                              {.threads = o_.threads});
            },
            engine);
      }
      together(world_, [&] {
        layer.emplace(*o_.latent, weights(), o_.decoding, *o_.slicing, calibration, world_, engine,
                      o_.weight_type, hosts_);
      });
      return decode_latent(*layer);
    }
    if (o_.latent) {
      if (o_.prefills) prefill([&] { return weights()(all_heads); }, engine);
      std::optional<LatentDecoder<Communicator>> layer;
      together(world_, [&] {
        layer.emplace(*o_.latent, weights(), o_.decoding, *o_.form, mesh_, world_, engine,
                      o_.weight_type, hosts_);
      });
      return decode_latent(*layer);
    }
    std::optional<Decoder<Communicator>> decoder;
    together(world_,
             [&] { decoder.emplace(o_.decoding, *o_.form, mesh_, world_, engine, hosts_); });
    return decode_heads(*decoder);
  }

 private:
  bool leads() const { return world_.rank() == 0; }
  int turns() const { return o_.warmup + o_.steps; }
  Index rows() const { return o_.decoding.queries * static_cast<Index>(o_.context.size()); }

  MakeWeights weights() const {
    return [this](Range heads) {
      LatentWeights made = o_.weights ? o_.weights->read(heads) : random(heads);
      if (o_.weight_type == Type::bf16) round_to_bfloat16(made);
      return made;
    };
  }

  Hidden hidden() const {
    return o_.x ? hidden_states(o_.x, o_.decoding)
                : hidden_states(o_.latent->model, o_.decoding, o_.seed);
  }

  void prefill(const std::function<LatentWeights()>& made, const EngineOptions& engine) {
    prefill_.emplace(world_, o_, made, weights(), hidden(), engine);
  }

  LatentWeights random(Range heads) const {
    LatentPart part = whole(*o_.latent);
    part.heads = heads;
    LatentWeights made = random_weights(*o_.latent, part, o_.seed, o_.threads);
    return o_.spectrum != 0 ? decaying(std::move(made), o_.spectrum) : made;
  }

  /// Mesh and memory, refused before anything is allocated.
  void settle() {
    const Hosts found = hosts_of(world_);
    together(world_, [&] { hosts_ = hosts_from(o_.hosts, world_.size(), found); });
    RankReport own;
    together(world_, [&] { own.host = this_host(); });
    std::vector<RankReport> ranks;
    for (const std::string& text : world_.all_gather(encoded(own))) ranks.push_back(decoded(text));
    // Some rank has its share of the cache at least: told at once, where to settle for far more
    // tokens than anybody has memory for would take minutes.
    const Decoding& d = o_.decoding;
    const Index numbers = d.key_heads * d.d_qk + (d.values_in_keys ? 0 : d.value_heads * d.d_v);
    needs_[Use::inputs] = d.keys() / world_.size() * numbers * bytes_of(d.type);
    if (!o_.slicing) refuse_beyond(ranks);
    together(world_, [&] {
      needs_ = {};
      o_.slicing ? settle_slices() : settle_form();
      if (o_.prefills) settle_prefill();
      needs_[Use::transport] = transport_bytes(world_.size());
      const Index each = sizeof(float);
      needs_[Use::results] =
          rows() * (o_.latent ? 2 * o_.latent->model : d.query_heads * (d.d_v + 1)) * each;
      if (o_.latent) {  // to add y up
        const Reduction of_y(all_ranks(world_.size()), hosts_, rows() * o_.latent->model);
        needs_[Use::transport] += of_y.scratch(world_.rank()) * each;
      }
    });
    refuse_beyond(ranks);
  }

  /// Collective: refuses what is more than --memory or the hosts have.
  void refuse_beyond(const std::vector<RankReport>& ranks) {
    const auto all = world_.all_gather(nlohmann::json(needs_.bytes).dump());
    together(world_, [&] {
      if (!leads()) return;
      std::vector<Needs> needs;
      for (const std::string& text : all) {
        needs.push_back({nlohmann::json::parse(text).get<decltype(Needs::bytes)>()});
      }
      const std::vector<Room> rooms = rooms_of(ranks);
      if (fits(needs, rooms, o_.memory)) return;
      std::fputs(memory_table(needs, rooms, o_.memory).c_str(), stderr);
      Index most = 0;
      for (const Needs& one : needs) most = std::max(most, one.sum());
      Index may = bytes_a_rank(ranks);
      if (o_.memory > 0 && (may == 0 || o_.memory < may)) may = o_.memory;
      throw Failure(Exit::memory,
                    fmt::format("{} needs {} on a rank, which has {}; use more hosts, fewer "
                                "ranks on this one, a larger --memory, a smaller --context or "
                                "--batch, or another --form",
                                o_.form_name, in_bytes(most), in_bytes(may)));
    });
  }

  /// The prefill has all heads, and is over, but for its rows and y, when the layer is made.
  void settle_prefill() {
    const LatentSizes& s = *o_.latent;
    const int ranks = world_.size();
    Index tokens = 0;
    for (const Index length : o_.context) tokens += (length + ranks - 1) / ranks;
    const Index all = weight_bytes(s.heads);
    const Index held = o_.weight_type == Type::bf16 ? all / 2 : all;
    const Index made = o_.slicing || o_.weight_type == Type::bf16 ? 2 * all : all;
    needs_[Use::inputs] +=
        tokens * (s.row() * bytes_of(o_.decoding.type) + s.model * bytes_of(Type::f4));
    // Prefill is over before decoding begins: what it needs beyond that counts.
    const Index at_most =
        std::max(made, held + prefill_bytes(s, o_.decoding, o_.context, ranks, o_.threads));
    needs_[Use::kernels] += std::max<Index>(0, at_most - needs_.sum());
  }

  void settle_form() {
    const Shape shape{1, 1, o_.decoding.query_heads, o_.decoding.key_heads, o_.decoding.value_heads,
                      1, 1};
    mesh_ = o_.mesh ? *o_.mesh : o_.form->mesh(world_.size(), shape);
    if (mesh_.ranks() != world_.size()) {
      throw Failure(Exit::usage, fmt::format("--mesh: a mesh of {} has {} ranks, but there are {}",
                                             mesh_.text(), mesh_.ranks(), world_.size()));
    }
    const Problem problem = decoding_problem(o_.decoding, mesh_).across(hosts_);
    if (const auto why = o_.form->refuses(problem)) {
      throw Failure(Exit::usage, fmt::format("--form: {} {}", o_.form->name, *why));
    }
    const Program program = o_.form->program(problem, world_.rank());
    needs_ =
        needs_of(problem, program, nullptr,
                 {.kernels = [this](const Problem& p,
                                    const Program& of) { return kernel_bytes(p, of, o_.threads); },
                  .check = {}});
    needs_[Use::inputs] +=
        o_.decoding.keys() * static_cast<Index>(sizeof(Index));  // rows of tokens
    if (!o_.latent) return;
    const auto block = [&](SlotId slot) -> const Block& {
      return program.slots[static_cast<std::size_t>(slot)].block;
    };
    needs_[Use::inputs] -=
        bytes_of(block(program.input(Kind::V)), problem.shape(), problem.type());  // is in K
    const Index heads = std::max(block(program.input(Kind::Q)).head_count(),
                                 program.result(Kind::O).block.head_count());
    if (o_.weight_type == Type::f4) {
      needs_[Use::weights] = weight_bytes(heads);
    } else {  // made in float, then rounded matrix by matrix, before there is anything in the cache
      const LatentSizes& s = *o_.latent;
      const Index largest = heads * std::max(s.q_width() * s.d_qk(), s.d_v * s.model);
      needs_[Use::weights] =
          std::max(weight_bytes(heads) / 2,
                   weight_bytes(heads) + largest * bytes_of(Type::bf16) - needs_.sum());
    }
  }

  void settle_slices() {
    if (const auto why = complaint(*o_.slicing, *o_.latent, world_.size())) {
      throw Failure(Exit::usage, "--slices, --basis: " + *why);
    }
    const int parts = world_.size() / o_.slicing->slices;
    mesh_ = {{{"heads", parts}, {"latent", o_.slicing->slices}}};
    const Index heads = (o_.latent->heads + parts - 1) / parts;
    const Index latent = (o_.latent->kv_rank + o_.slicing->slices - 1) / o_.slicing->slices;
    // The weights are cut from those of the whole latent.
    needs_[Use::weights] = 2 * weight_bytes(heads);
    needs_[Use::inputs] =
        o_.decoding.keys() * (latent + o_.latent->d_rope) * bytes_of(o_.decoding.type);
  }

  Index weight_bytes(Index heads) const {
    const LatentSizes& s = *o_.latent;
    const Index down = s.model * (s.q_rank + s.row());  // once more: the columns of a rank
    const Index numbers =
        down + down / world_.size() +
        heads * (s.q_width() * s.d_qk() + s.kv_rank * (s.d_nope + s.d_v) + s.d_v * s.model);
    return numbers * static_cast<Index>(sizeof(float));
  }

  template <class Layer>
  Exit decode_latent(Layer& layer) {
    const Hidden hidden = this->hidden();
    const Index each = o_.decoding.queries;
    const Index model = o_.latent->model;
    std::vector<Index> lengths = o_.context;
    world_.phase("cache");
    if (prefill_) {
      prefill_->hand_over(layer);
    } else {
      together(world_, [&] { o_.drawn ? layer.draw(lengths) : layer.fill(lengths, hidden); });
    }
    world_.phase("decoding");
    std::vector<float> x(static_cast<std::size_t>(rows() * model));
    std::vector<float> y(x.size());
    for (int turn = 0; turn < turns(); ++turn) {
      together(world_, [&] {
        for (std::size_t s = 0; s < lengths.size(); ++s) {
          hidden(s, {{lengths[s], each, 1}}, &x[s * static_cast<std::size_t>(each * model)]);
          lengths[s] += each;
        }
      });
      world_.barrier();
      const LatentTimes t = layer.step(lengths, {x.data(), rows(), 1, model}, y);
      note(turn, {t.seconds, t.project, t.attention.compute, t.gather + t.attention.wait, t.reduce},
           t.bytes_sent, t.between_hosts, t.messages);
    }
    world_.phase("check and output");
    if (o_.check) verdict_ = check_latent(world_, weights(), o_.decoding, lengths, hidden, y);
    // Weights that were turned or folded are rounded once more.
    if (verdict_ && o_.slicing && o_.weight_type == Type::bf16) verdict_->bound = 8e-3;
    if (verdict_ && approximate()) verdict_->bound = std::numeric_limits<double>::infinity();
    // All ranks have y.
    write_out({rows(), model}, leads() ? Ranges{{0, 1}} : Ranges{}, y);
    return report(layer.cache_bytes(lengths), lengths);
  }

  Exit decode_heads(Decoder<Communicator>& decoder) {
    const DecodeTensors tensors(o_.decoding, *o_.source);
    std::vector<Index> lengths = o_.context;
    world_.phase("cache");
    for (std::size_t s = 0; s < lengths.size(); ++s) tensors.append(decoder, s, {0, lengths[s]});
    note_program(world_, decoder.program());
    world_.phase("decoding");
    for (int turn = 0; turn < turns(); ++turn) {
      std::vector<Index> before = lengths;
      for (std::size_t s = 0; s < lengths.size(); ++s) {
        lengths[s] += o_.decoding.queries;
        tensors.append(decoder, s, {before[s], lengths[s]});
      }
      tensors.ask(decoder, lengths);
      world_.barrier();
      const RunTimes t = decoder.step(lengths);
      note(turn, {t.seconds, 0, t.compute, t.wait, 0}, t.bytes_sent, t.between_hosts, t.messages);
    }
    world_.phase("check and output");
    if (o_.check) verdict_ = check_heads(world_, decoder, tensors, lengths);
    const auto numbers = static_cast<std::size_t>(rows() * size(decoder.gets()));
    std::vector<float> lse(numbers);
    std::vector<float> o(numbers * static_cast<std::size_t>(o_.decoding.d_v));
    decoder.result(o, lse);
    write_out({rows(), o_.decoding.query_heads, o_.decoding.d_v}, decoder.gets(), o);
    return report(decoder.cache().bytes(lengths, o_.decoding), lengths);
  }

  /// Writes this rank's heads of the last step, `values` [rows, heads, shape.back()], into the file
  /// that all ranks write together; report() gives it its name.
  void write_out(const std::vector<std::int64_t>& shape, const Ranges& heads,
                 std::span<const float> values) {
    const std::string job = agree_on_outputs(world_, {o_.out, o_.json});
    if (o_.out.empty()) return;
    const std::string header = npy_header(NpyHeader::Type::f4, shape);
    const Index each = shape.back() * static_cast<Index>(sizeof(float));
    const Index row = shape.size() == 3 ? shape[1] * each : each;
    const auto front = static_cast<Index>(header.size());
    together(world_, [&] {
      if (leads()) file_ = OutputFile::create(o_.out, front + row * shape[0], job, header);
    });
    together(world_, [&] {
      if (!file_) file_ = OutputFile::join(o_.out, job);
      auto bytes = std::as_bytes(values);
      for (Index r = 0; r < shape[0]; ++r) {
        for (const Range some : heads) {
          const auto part = static_cast<std::size_t>(some.size() * each);
          file_->write_at(front + r * row + some.begin * each, bytes.first(part));
          bytes = bytes.subspan(part);
        }
      }
      file_->sync();
    });
  }

  void note(int turn, const Step& step, Index bytes, Index between_hosts, Index messages) {
    if (turn >= o_.warmup) steps_.push_back(step);
    bytes_ = bytes;
    between_hosts_ = between_hosts;
    messages_ = messages;
  }

  /// Whether the form computes something else than the model.
  bool approximate() const { return o_.slicing && !o_.slicing->exact && o_.slicing->slices > 1; }

  Exit report(Index cached, const std::vector<Index>& lengths) {
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
    std::array<std::int64_t, 4> sums{cached, bytes_, messages_, between_hosts_};
    world_.all_reduce_sum(std::span<std::int64_t>(sums));
    std::array<std::int64_t, 3> most{cached, bytes_, needs_.sum()};
    world_.all_reduce_max(std::span<std::int64_t>(most));
    together(world_, [&] {
      if (!leads()) return;
      const double rate = static_cast<double>(rows()) / median;
      const std::string& name = o_.form_name;
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
          {"weights_dtype", o_.latent ? name_of(o_.weight_type) : "none"},
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
          {"hosts", hosts_.text()},
          {"bytes_between_hosts_step", sums[3]},
          {"messages_step", sums[2]}};
      if (o_.latent) j["cache"] = o_.prefills ? "prefill" : o_.drawn ? "drawn" : "made";
      if (prefill_) j["prefill"] = prefill_->json();
      if (verdict_)
        j["check"] = {
            {"error", verdict_->error}, {"bound", verdict_->bound}, {"passed", verdict_->passed()}};
      std::string text = fmt::format(
          "decode: {} over {} ranks (mesh {}), {} sequences, {} new tokens a step, {} tokens "
          "cached, {}, {}"
          "kernels for {}{}\n",
          name, world_.size(), mesh_.text(), o_.context.size(), o_.decoding.queries, tokens,
          name_of(o_.decoding.type),
          o_.latent ? fmt::format("weights {}, ", name_of(o_.weight_type)) : "", chosen_isa().name,
          approximate() ? "; APPROXIMATE: each slice has a softmax of its own"
          : o_.slicing  ? ""
                        : "; proved");
      if (prefill_) text += prefill_->text();
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
      if (hosts_.count() > 1) {
        text += fmt::format("hosts: {}; {} of a step go between them\n", hosts_.text(),
                            in_bytes(sums[3]));
      }
      if (verdict_ && approximate()) {
        text +=
            fmt::format("check: the layer's y of the last step is {:.3e} off that of the model\n",
                        verdict_->error);
      } else if (verdict_) {
        text += fmt::format(
            "check: {} of the last step, ||X-Xref||/||Xref|| = {:.3e} (bound {:.0e}) ...... {}\n",
            o_.latent ? "the layer's y" : "O", verdict_->error, verdict_->bound,
            verdict_->passed() ? "PASSED" : "FAILED");
      }
      if (!o_.json.empty()) write_text_file(o_.json, j.dump(1) + "\n");
      if (o_.json != "-") write_text_file("-", text);
      // Last: a report that cannot be written leaves no file behind.
      if (file_) file_->commit();
    });
    const bool prefilled = !prefill_ || !prefill_->verdict() || prefill_->verdict()->passed();
    return prefilled && (!verdict_ || verdict_->passed()) ? Exit::ok : Exit::check_failed;
  }

  Communicator& world_;
  const DecodeOptions& o_;
  Hosts hosts_;
  Mesh mesh_;
  Needs needs_;  ///< of this rank
  std::vector<Step> steps_;
  Index bytes_ = 0;
  Index between_hosts_ = 0;
  Index messages_ = 0;
  std::optional<DecodePrefill> prefill_;
  std::optional<DecodeVerdict> verdict_;
  std::optional<OutputFile> file_;  ///< of --out
};

}  // namespace

Exit decode_command(const std::vector<std::string>& given) {
  const std::vector<std::string> arguments = with_default_files(given);
  const boost::program_options::options_description described = decode_options();
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    return print_help(described);
  }
  const std::string command = "dattn decode";
  return on_all_ranks(command, early_watch(arguments), [&](Communicator& world, auto&) {
    world.phase("options");
    std::optional<DecodeOptions> options;
    together(world, [&] {
      if (const auto complaint = comm::launch_complaint(
              world.size(), std::getenv("OMPI_COMM_WORLD_SIZE"), std::getenv("SLURM_NTASKS"))) {
        throw Failure(Exit::usage, *complaint);
      }
      options = read_decode_options(parse(command, described, arguments), world.size());
    });
    Signature fields{{"instruction set", chosen_isa().name}};
    for (const auto& option : described.options()) {
      const std::string name = "--" + option->long_name();
      fields.emplace_back(name, written(arguments, name));
    }
    // Files of one name may differ.
    const Decoding& d = options->decoding;
    for (const auto& [name, value] :
         {std::pair{"query heads", d.query_heads}, std::pair{"key heads", d.key_heads},
          std::pair{"value heads", d.value_heads}, std::pair{"numbers a head of Q and K", d.d_qk},
          std::pair{"numbers a head of V", d.d_v}}) {
      fields.emplace_back(name, std::to_string(value));
    }
    together(world, [&] {
      if (options->weights) fields.emplace_back("numbers in --weights", options->weights->sum());
      if (!options->x) return;
      FileSum sum;
      sum.add(*options->x);
      fields.emplace_back("numbers in --x", sum.text());
    });
    try {
      require_agreement(world, fields);
    } catch (const Disagreement& e) {
      if (world.rank() == 0) complain(world.rank(), command, e.what());
      return Exit::usage;
    }
    return DecodeJob(world, *options).run();
  });
}

}  // namespace dattn
