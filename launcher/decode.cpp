// dattn decode: token by token over a KV cache that is sharded once.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "comm/session.hpp"
#include "kernels/isa.hpp"
#include "kernels/latent/basis.hpp"
#include "kernels/latent/blas_core.hpp"
#include "launcher/calibrate.hpp"
#include "launcher/commands.hpp"
#include "launcher/decode_check.hpp"
#include "launcher/decode_memory.hpp"
#include "launcher/decode_options.hpp"
#include "launcher/decode_prefill.hpp"
#include "launcher/file_sum.hpp"
#include "launcher/links.hpp"
#include "launcher/moved.hpp"
#include "launcher/output_file.hpp"
#include "launcher/rank_speeds.hpp"
#include "launcher/report.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"
#include "parallel/latent_values.hpp"

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
    const Hosts found = hosts_of(world_);
    together(world_, [&] { hosts_ = hosts_from(o_.hosts, world_.size(), found); });
    const DecodePlace place = settle_decoding(world_, o_, hosts_);
    mesh_ = place.mesh;
    memory_ = place.needs.sum();
    const EngineOptions engine{.score = o_.scoring.score,
                               .sinks = o_.scoring.sinks,
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
                      o_.weight_type, hosts_, o_.values);
      });
      note_program(world_, layer->decoder().program());
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
    prefill_.emplace(world_, o_, made, weights(), hidden(), engine, hosts_);
  }

  LatentWeights random(Range heads) const {
    LatentPart part = whole(*o_.latent);
    part.heads = heads;
    LatentWeights made = random_weights(*o_.latent, part, o_.seed, o_.threads);
    return o_.spectrum != 0 ? decaying(std::move(made), o_.spectrum) : made;
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
          const Index before = o_.decoding.before(s) + lengths[s];
          hidden(s, {{before, each, 1}}, &x[s * static_cast<std::size_t>(each * model)]);
          lengths[s] += each;
        }
      });
      world_.barrier();
      const LatentTimes t = layer.step(lengths, {x.data(), rows(), 1, model}, y);
      note(turn, {t.seconds, t.project, t.attention.compute, t.gather + t.attention.wait, t.reduce},
           t.bytes_sent, t.between_hosts, t.messages, t.envelopes);
    }
    world_.phase("check and output");
    if (o_.check) verdict_ = check_latent(world_, weights(), o_.decoding, lengths, hidden, y);
    // Weights that were turned or folded are rounded once more.
    if (verdict_ && o_.slicing && o_.weight_type == Type::bf16) verdict_->bound = 8e-3;
    if (verdict_ && approximate()) verdict_->bound = std::numeric_limits<double>::infinity();
    // All ranks have y.
    write_out(o_.out, {rows(), model}, leads() ? Ranges{{0, model}} : Ranges{}, y);
    write_out(o_.lse, {rows(), o_.decoding.query_heads}, layer.gets(), layer.lse());
    return report(layer.cache_bytes(lengths), lengths);
  }

  Exit decode_heads(Decoder<Communicator>& decoder) {
    const DecodeTensors tensors(o_.decoding, *o_.source);
    std::vector<Index> lengths = o_.context;
    world_.phase("cache");
    RaggedCache* ragged = decoder.ragged();
    tensors.append_prefixes(decoder);
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      if (ragged != nullptr) ragged->advance(s, lengths[s]);
      tensors.append(decoder, s, {0, lengths[s]});
    }
    note_program(world_, decoder.program());
    world_.phase("decoding");
    for (int turn = 0; turn < turns(); ++turn) {
      std::vector<Index> before = lengths;
      for (std::size_t s = 0; s < lengths.size(); ++s) {
        lengths[s] += o_.decoding.queries;
        if (ragged != nullptr) ragged->advance(s, before[s]);
        tensors.append(decoder, s, {before[s], lengths[s]});
      }
      tensors.ask(decoder, lengths);
      world_.barrier();
      const RunTimes t = decoder.step(lengths);
      note(turn, {t.seconds, 0, t.compute, t.wait, 0}, t.bytes_sent, t.between_hosts, t.messages,
           t.envelopes);
    }
    world_.phase("check and output");
    if (o_.check) verdict_ = check_heads(world_, decoder, tensors, lengths, o_.scoring);
    const auto numbers = static_cast<std::size_t>(rows() * size(decoder.gets()));
    std::vector<float> lse(numbers);
    std::vector<float> o(numbers * static_cast<std::size_t>(o_.decoding.d_v));
    decoder.result(o, lse);
    const Index heads = o_.decoding.query_heads;
    write_out(o_.out, {rows(), heads, o_.decoding.d_v}, decoder.gets(), o);
    write_out(o_.lse, {rows(), heads}, decoder.gets(), lse);
    if (ragged == nullptr) return report(decoder.cache().bytes(lengths, o_.decoding), lengths);
    for (const std::string& text : world_.all_gather(nlohmann::json(ragged->tokens()).dump())) {
      kv_tokens_.push_back(nlohmann::json::parse(text));
    }
    std::array<std::int64_t, 1> held{ragged->held_bytes()};
    world_.all_reduce_sum(std::span<std::int64_t>(held));
    kv_bytes_held_ = held[0];
    return report(ragged->bytes(), lengths);
  }

  /// Writes this rank's heads of the last step, `values` [rows, `heads`, ...], into a file of
  /// `shape`, [rows, heads, ...], that all ranks write together; report() gives it its name.
  void write_out(const std::string& path, const std::vector<std::int64_t>& shape,
                 const Ranges& heads, std::span<const float> values) {
    if (job_.empty()) job_ = agree_on_outputs(world_, {o_.out, o_.lse, o_.json});
    if (path.empty()) return;
    const std::string header = npy_header(NpyHeader::Type::f4, shape);
    const Index each = (shape.size() > 2 ? shape[2] : 1) * static_cast<Index>(sizeof(float));
    const Index row = shape[1] * each;
    const auto front = static_cast<Index>(header.size());
    std::optional<OutputFile> file;
    together(world_, [&] {
      if (leads()) file = OutputFile::create(path, front + row * shape[0], job_, header);
    });
    together(world_, [&] {
      if (!file) file = OutputFile::join(path, job_);
      auto bytes = std::as_bytes(values);
      for (Index r = 0; r < shape[0]; ++r) {
        for (const Range some : heads) {
          const auto part = static_cast<std::size_t>(some.size() * each);
          file->write_at(front + r * row + some.begin * each, bytes.first(part));
          bytes = bytes.subspan(part);
        }
      }
      file->sync();
    });
    files_.push_back(std::move(*file));
  }

  void note(int turn, const Step& step, Index bytes, Index between_hosts, Index messages,
            Index envelopes) {
    if (turn >= o_.warmup) steps_.push_back(step);
    bytes_ = bytes;
    between_hosts_ = between_hosts;
    messages_ = messages;
    envelopes_ = envelopes;
  }

  /// Whether the form computes something else than the model.
  bool approximate() const { return o_.slicing && !o_.slicing->exact && o_.slicing->slices > 1; }

  /// Whether W_UV may be applied on either side of a merge.
  bool has_values_choice() const {
    return o_.latent && o_.form != nullptr && o_.form->name == "sequence" && world_.size() > 1;
  }
  ValuesBytes values_bytes(Values where) const {
    return dattn::values_bytes(*o_.latent, rows(), world_.size(), o_.weight_type, where);
  }

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
    std::array<std::int64_t, 5> sums{cached, bytes_, messages_, between_hosts_, envelopes_};
    world_.all_reduce_sum(std::span<std::int64_t>(sums));
    std::array<std::int64_t, 3> most{cached, bytes_, memory_};
    world_.all_reduce_max(std::span<std::int64_t>(most));
    together(world_, [&] {
      if (!leads()) return;
      const double rate = static_cast<double>(rows()) / median;
      const std::string& name = o_.form_name;
      const Index shared = o_.decoding.shared();
      const Index tokens = std::accumulate(lengths.begin(), lengths.end(), shared);
      nlohmann::json j{
          {"version", 1},
          {"command", "decode"},
          {"form", name},
          {"model", escaped(o_.model)},
          {"ranks", world_.size()},
          {"mesh", mesh_.text()},
          {"threads", o_.threads},
          {"isa", chosen_isa().name},
          {"blas", o_.latent ? blas_core() : "none"},
          {"dtype", name_of(o_.decoding.type)},
          {"weights_dtype", o_.latent ? name_of(o_.weight_type) : "none"},
          {"batch", o_.context.size()},
          {"new_tokens", o_.decoding.queries},
          {"context", o_.context},
          {"prefix_tree", o_.prefix_tree.empty() ? "none" : o_.prefix_tree},
          {"prefix_tokens", shared},
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
      if (o_.verify_wire) j["verified_step"] = verified_json(sums[4]);
      if (!o_.latent) j["mask"] = escaped(o_.mask);
      if (const Speeds& speeds = o_.decoding.speeds; !speeds.equal()) {
        for (int r = 0; r < speeds.size(); ++r) j["rank_speeds"].push_back(speeds.of(r));
      }
      add_scoring(j, o_.scoring);
      if (!kv_tokens_.empty()) {
        j["kv_tokens"] = kv_tokens_;
        j["kv_bytes_held"] = kv_bytes_held_;
      }
      j["values"] = o_.latent ? name_of(o_.values) : "none";
      if (has_values_choice()) {
        for (const Values where : {Values::after, Values::before}) {
          const ValuesBytes bytes = values_bytes(where);
          j["values_bytes"][name_of(where)] = {{"sent", bytes.sent}, {"read", bytes.read}};
        }
      }
      if (o_.latent) j["cache"] = o_.prefills ? "prefill" : o_.drawn ? "drawn" : "made";
      if (prefill_) j["prefill"] = prefill_->json();
      if (verdict_)
        j["check"] = {
            {"error", verdict_->error}, {"bound", verdict_->bound}, {"passed", verdict_->passed()}};
      std::string text = fmt::format(
          "decode: {} over {} ranks (mesh {}), {} sequences, {} new tokens a step, {} tokens "
          "cached{}{}, {}, {}"
          "kernels for {}{}{}\n",
          name, world_.size(), mesh_.text(), o_.context.size(), o_.decoding.queries, tokens,
          shared > 0 ? fmt::format(" ({} of them shared)", shared) : "", dattn::text(o_.scoring),
          name_of(o_.decoding.type),
          o_.latent ? fmt::format("weights {}, ", name_of(o_.weight_type)) : "", chosen_isa().name,
          o_.latent ? fmt::format(", OpenBLAS's for {}", blas_core()) : "",
          approximate() ? "; APPROXIMATE: each slice has a softmax of its own"
          : o_.slicing  ? ""
                        : "; proved");
      if (o_.measures_speeds || !o_.decoding.speeds.equal()) {
        text += speeds_line(o_.measures_speeds, o_.decoding.speeds);
      }
      if (prefill_) text += prefill_->text();
      if (!kv_tokens_.empty()) {
        text += fmt::format(
            "mask {}: heads keep what tokens to come may see, {} with what has not "
            "closed up yet\n",
            o_.mask, in_bytes(kv_bytes_held_));
      }
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
      if (o_.verify_wire) text += "each step: " + verified_line(sums[4]);
      if (has_values_choice()) {
        const bool is_before = o_.values == Values::before;
        const Values other = is_before ? Values::after : Values::before;
        const auto in_words = [&](Values where) {
          const ValuesBytes bytes = values_bytes(where);
          return fmt::format("{} sent and {} of it read", in_bytes(bytes.sent),
                             in_bytes(bytes.read));
        };
        text +=
            fmt::format("W_UV {} the merge, a step of all ranks: {}; {}: {}\n", name_of(o_.values),
                        in_words(o_.values), name_of(other), in_words(other));
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
      for (OutputFile& file : files_) file.commit();
    });
    const bool prefilled = !prefill_ || !prefill_->verdict() || prefill_->verdict()->passed();
    return prefilled && (!verdict_ || verdict_->passed()) ? Exit::ok : Exit::check_failed;
  }

  Communicator& world_;
  const DecodeOptions& o_;
  Hosts hosts_;
  Mesh mesh_;
  Index memory_ = 0;  ///< that this rank needs
  std::vector<Step> steps_;
  Index bytes_ = 0;
  Index between_hosts_ = 0;
  Index messages_ = 0;
  Index envelopes_ = 0;
  std::optional<DecodePrefill> prefill_;
  std::optional<DecodeVerdict> verdict_;
  std::string job_;                                     ///< of agree_on_outputs()
  std::vector<OutputFile> files_;                       ///< of --out and --lse
  nlohmann::json kv_tokens_ = nlohmann::json::array();  ///< under masks: kept, [rank][key head]
  Index kv_bytes_held_ = 0;                             ///< of all ranks
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
    fields.emplace_back("masks", options->mask);
    fields.emplace_back("numbers of --mask", options->mask_sum);
    fields.emplace_back("contents of the scores' files", options->scoring.files_sum);
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
    if (options->measures_speeds) {
      world.phase("calibration");
      const Shape like{1, d.keys(), d.query_heads, d.key_heads, d.value_heads, d.d_qk, d.d_v};
      options->decoding.speeds = measure_decode_speeds(world, like, d.type, options->threads);
    }
    return DecodeJob(world, *options).run();
  });
}

}  // namespace dattn
