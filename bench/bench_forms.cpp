// Question: how close does a step of decoding in latent attention, split over ranks in each form,
// come to what this machine's FLOPs and bytes allow; and the forms' ratios to those allowed?
//
//   mpirun -np 16 --bind-to core build/release/bench/bench_forms --model deepseek-v3 --context 32K
//                 --ranks 1,2,4,8,16 --dtype bf16 --weights-dtype bf16 --json forms.json
//
// Of each number of ranks the first ones of the job work and the others sleep. A repeat measures
// the ceilings on all of these at once, then runs some steps of each form; ratios are of one
// repeat.
#include <fmt/format.h>

#include <array>

#include "bench/ceilings.hpp"
#include "bench/decode_runs.hpp"
#include "bench/latent_ideal.hpp"
#include "bench/main.hpp"
#include "bench/measure.hpp"
#include "kernels/isa.hpp"
#include "kernels/latent/blas_core.hpp"
#include "launcher/values.hpp"
#include "launcher/version.hpp"
#include "parallel/latent_parts.hpp"
#include "parallel/latent_slices.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;

constexpr const char* kName = "bench_forms";

struct Options : DecodeRuns {
  LatentSizes sizes;
  std::string model;
  std::vector<std::string> forms;
  Type weight_type = Type::bf16;
  int slices = 2;
};

po::options_description described_options() {
  std::vector<std::string> models;
  for (const LatentModel& model : latent_models()) models.emplace_back(model.name);
  po::options_description options(
      "bench_forms: steps of decoding in latent attention, over ranks in each form");
  options.add_options()                                                           //
      ("model", word(models)->default_value("deepseek-v3"), "the layer's sizes")  //
      ("forms",
       words({"heads", "sequence", "exact", "helix", "tree", "tpla"})
           ->default_value({"heads", "sequence", "exact", "helix", "tpla"},
                           "heads,sequence,exact,helix,tpla"),
       "which ones, as a comma list")                                                   //
      ("weights-dtype", word({"bf16", "f4"})->default_value("bf16"), "of the weights")  //
      ("slices", po::value<Positive>()->default_value({2}),
       "pieces of the latent for tpla; exact takes as many as ranks");
  add_decode_runs(options, 32768, "32K");
  return options;
}

Options read_options(const po::variables_map& values, int ranks) {
  Options o;
  static_cast<DecodeRuns&>(o) = read_decode_runs(values, ranks);
  o.model = values["model"].as<std::string>();
  o.sizes = *find_latent_model(o.model);
  o.forms = values["forms"].as<std::vector<std::string>>();
  o.weight_type = values["weights-dtype"].as<std::string>() == "bf16" ? Type::bf16 : Type::f4;
  o.slices = at_most("slices", values["slices"].as<Positive>().value, 1 << 20);
  return o;
}

/// Weights that cost little to draw; what is computed from them is no matter.
LatentWeights drawn(const LatentSizes& sizes, Range heads) {
  const Index h = heads.size();
  LatentPart part = whole(sizes);
  part.heads = heads;
  LatentWeights w{.sizes = sizes, .part = part};
  std::uint64_t seed = 0;
  const auto draw = [&](std::vector<float>& numbers, Index count, Index inputs) {
    numbers.resize(static_cast<std::size_t>(count));
    draw_numbers(numbers.data(), count, ++seed);
    const auto scale = static_cast<float>(std::sqrt(3.0 / static_cast<double>(inputs)));
    for (float& x : numbers) x *= scale;
  };
  draw(w.down_q, sizes.model * sizes.q_rank, sizes.model);
  draw(w.up_q, sizes.q_width() * h * sizes.d_qk(), sizes.q_width());
  draw(w.down_kv, sizes.model * sizes.row(), sizes.model);
  draw(w.up_k, h * sizes.kv_rank * sizes.d_nope, sizes.kv_rank);
  draw(w.up_v, h * sizes.kv_rank * sizes.d_v, sizes.kv_rank);
  draw(w.out, h * sizes.d_v * sizes.model, sizes.heads * sizes.d_v);
  w.q_gamma.assign(static_cast<std::size_t>(sizes.q_rank), 1);
  w.kv_gamma.assign(static_cast<std::size_t>(sizes.kv_rank), 1);
  return w;
}

/// One form on some ranks.
struct Subject {
  std::string form;
  int slices = 1;
  std::string refused;  ///< why it has no figures
  std::function<LatentTimes(std::span<const Index>, View<const float>, std::span<float>)> step;
  // Of each repeat; the phases those of the slowest rank in each.
  std::vector<double> seconds, allowed, project, attention, wait, reduce;
};

template <class Layer>
void use(Subject& subject, std::shared_ptr<Layer> layer, std::span<const Index> lengths) {
  layer->draw(lengths);
  subject.step = [layer](std::span<const Index> now, View<const float> x, std::span<float> y) {
    return layer->step(now, x, y);
  };
}

Subject made(const std::string& form, const Options& o, const Decoding& decoding,
             Communicator& ranks) {
  Subject subject;
  subject.form = form;
  const EngineOptions engine{.threads = o.threads};
  const MakeWeights weights = [&](Range heads) { return drawn(o.sizes, heads); };
  if (form != "exact" && form != "tpla") {
    use(subject,
        std::make_shared<LatentDecoder<Communicator>>(o.sizes, weights, decoding,
                                                      *find_decode_form(form), std::nullopt, ranks,
                                                      engine, o.weight_type),
        o.context);
    return subject;
  }
  const Slicing slicing{.slices = form == "exact" ? ranks.size() : o.slices,
                        .exact = form == "exact",
                        .factor = Slicing::Factor::one};
  subject.slices = slicing.slices;
  if (const auto why = complaint(slicing, o.sizes, ranks.size())) {
    subject.refused = *why;
    return subject;
  }
  std::vector<float> x(static_cast<std::size_t>(o.sizes.model));
  draw_numbers(x.data(), o.sizes.model, 1);
  use(subject,
      std::make_shared<SlicedDecoder<Communicator>>(
          o.sizes, weights, decoding, slicing, View<const float>{x.data(), 1, 1, o.sizes.model},
          ranks, engine, o.weight_type),
      o.context);
  return subject;
}

/// The median over some steps of the slowest rank's time, with the phases of the step in the
/// middle.
void run(Subject& subject, const Options& o, Communicator& ranks, std::span<const Index> lengths,
         View<const float> x, std::span<float> y) {
  std::vector<std::array<double, 5>> all;
  for (int i = 0; i < o.steps; ++i) {
    ranks.barrier();
    const LatentTimes t = subject.step(lengths, x, y);
    std::array<double, 5> most{t.seconds, t.project, t.attention.compute,
                               t.gather + t.attention.wait, t.reduce};
    ranks.all_reduce_max(most);
    all.push_back(most);
  }
  std::nth_element(all.begin(), all.begin() + o.steps / 2, all.end());
  const auto& middle = all[static_cast<std::size_t>(o.steps / 2)];
  subject.seconds.push_back(middle[0]);
  subject.project.push_back(middle[1]);
  subject.attention.push_back(middle[2]);
  subject.wait.push_back(middle[3]);
  subject.reduce.push_back(middle[4]);
}

/// Median of a / b, repeat by repeat.
double ratio(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < a.size(); ++i) ratios.push_back(a[i] / b[i]);
  return median(ratios);
}

/// What bfloat16 products in registers reach.
struct Registers {
  const char* name = nullptr;  ///< AMX, or pairs (AVX-512 BF16); null: neither is there
  double (*gflops)(int threads) = nullptr;
};

Registers best_registers() {
  if (amx_registers::present()) return {"AMX", amx_registers::gflops};
  if (pair_registers::present()) return {"pairs", pair_registers::gflops};
  return {};
}

/// All forms on these ranks: rows, the same on each.
nlohmann::ordered_json measure(const Options& o, Communicator& ranks,
                               const std::optional<Sgemm>& sgemm, const Registers& registers) {
  const std::vector<Index> lengths = o.lengths();
  const Decoding decoding = latent_decoding(o.sizes, lengths, o.queries, o.type);
  std::vector<Subject> subjects;
  together(ranks, [&] {
    if (const auto why = complaint(decoding)) throw Failure(Exit::usage, *why);
    for (const std::string& form : o.forms) subjects.push_back(made(form, o, decoding, ranks));
  });
  const Index rows = o.queries * static_cast<Index>(lengths.size());
  std::vector<float> numbers(static_cast<std::size_t>(rows * o.sizes.model));
  draw_numbers(numbers.data(), rows * o.sizes.model, 3);
  std::vector<float> y(numbers.size());
  std::optional<MemoryRead> read;
  together(ranks,
           [&] { read.emplace(o.threads, o.read / static_cast<std::size_t>(ranks.size())); });
  std::vector<double> sgemm_rates, register_rates, read_rates;
  for (int repeat = -1; repeat < o.repeats; ++repeat) {
    std::array<double, 3> rates{};  // of all ranks at once
    ranks.barrier();
    rates[0] = sgemm->gflops(o.threads);
    ranks.barrier();
    if (registers.name != nullptr) rates[1] = registers.gflops(o.threads);
    ranks.barrier();
    rates[2] = read->gbps();
    ranks.all_reduce_sum(rates);
    for (double& rate : rates) rate /= ranks.size();
    const bool narrow = registers.name != nullptr && o.type == Type::bf16;
    const LatentRates of_rank{rates[narrow ? 1 : 0] * 1e9, rates[0] * 1e9, rates[2] * 1e9};
    for (Subject& subject : subjects) {
      if (!subject.step) continue;
      run(subject, o, ranks, lengths, {numbers.data(), rows, 1, o.sizes.model}, y);
      subject.allowed.push_back(
          allowed_seconds(cost_of(subject.form, subject.slices,
                                  {o.sizes, lengths, o.queries, bytes_of(o.type),
                                   bytes_of(o.weight_type), ranks.size()}),
                          of_rank));
    }
    if (repeat < 0) {  // warmed up
      for (Subject& s : subjects) {
        for (auto* figures : {&s.seconds, &s.allowed, &s.project, &s.attention, &s.wait, &s.reduce})
          figures->clear();
      }
      continue;
    }
    sgemm_rates.push_back(rates[0]);
    register_rates.push_back(rates[1]);
    read_rates.push_back(rates[2]);
  }
  nlohmann::ordered_json out = nlohmann::ordered_json::array();
  const auto heads = std::find_if(subjects.begin(), subjects.end(),
                                  [](const Subject& s) { return s.form == "heads"; });
  for (const Subject& s : subjects) {
    nlohmann::ordered_json row{{"model", o.model},
                               {"ranks", ranks.size()},
                               {"threads", o.threads},
                               {"form", "latent-" + s.form},
                               {"slices", s.slices},
                               {"dtype", name_of(o.type)},
                               {"weights_dtype", name_of(o.weight_type)},
                               {"context", o.context.front()},
                               {"batch", o.context.size()},
                               {"new_tokens", o.queries},
                               {"isa", chosen_isa().name},
                               {"sgemm_gflops_rank", median(sgemm_rates)},
                               {"bf16_gflops_rank", nullptr},
                               {"bf16_by", nullptr},
                               {"read_gbps_rank", median(read_rates)},
                               {"refused", nullptr}};
    if (registers.name != nullptr) {
      row["bf16_gflops_rank"] = median(register_rates);
      row["bf16_by"] = registers.name;
    }
    if (!s.step) {
      row["refused"] = s.refused;
      out.push_back(row);
      continue;
    }
    const LatentCost cost = cost_of(
        s.form, s.slices,
        {o.sizes, lengths, o.queries, bytes_of(o.type), bytes_of(o.weight_type), ranks.size()});
    row["approximate"] = s.form == "tpla" && s.slices > 1;
    row["attention_flops"] = cost.attention_flops;
    row["attention_bytes"] = cost.attention_bytes;
    row["weights_flops"] = cost.weights_flops;
    row["weights_bytes"] = cost.weights_bytes;
    row["repeats"] = o.repeats;
    row["seconds"] = median(s.seconds);
    row["allowed_seconds"] = median(s.allowed);
    row["of_allowed"] = ratio(s.allowed, s.seconds);
    row["heads_over_form"] = nullptr;
    row["heads_over_form_allowed"] = nullptr;
    row["ratio_of_allowed"] = nullptr;
    if (heads != subjects.end()) {
      const double measured = ratio(heads->seconds, s.seconds);
      const double allowed = ratio(heads->allowed, s.allowed);
      row["heads_over_form"] = measured;
      row["heads_over_form_allowed"] = allowed;
      row["ratio_of_allowed"] = measured / allowed;
    }
    row["project_seconds"] = median(s.project);
    row["attention_seconds"] = median(s.attention);
    row["wait_seconds"] = median(s.wait);
    row["reduce_seconds"] = median(s.reduce);
    out.push_back(row);
  }
  return out;
}

std::string table(const nlohmann::ordered_json& rows) {
  const auto& first = rows.front();
  std::string text = fmt::format(
      "\n{} ranks x {} threads; a rank, all at once: SGEMM {:.0f} GFLOP/s, {}read {:.1f} GB/s\n"
      "{:<16} {:>9} {:>9} {:>6}  {:>10} {:>8} {:>6}   {}\n",
      first["ranks"].get<int>(), first["threads"].get<int>(),
      first["sgemm_gflops_rank"].get<double>(),
      first["bf16_by"].is_null()
          ? ""
          : fmt::format("bfloat16 by {} {:.0f}, ", first["bf16_by"].get<std::string>(),
                        first["bf16_gflops_rank"].get<double>()),
      first["read_gbps_rank"].get<double>(), "form", "ms", "allowed", "of it", "heads:form",
      "allowed", "of it", "projections, attention, waiting, all-reduce of y, ms");
  for (const auto& row : rows) {
    const auto form = row["form"].get<std::string>();
    if (!row["refused"].is_null()) {
      text += fmt::format("{:<16} refused: {}\n", form, row["refused"].get<std::string>());
      continue;
    }
    const auto number = [&](const char* name) { return row[name].get<double>(); };
    const auto over_heads = [&](const char* name) {
      return row[name].is_null() ? "-" : fmt::format("{:.2f}", number(name));
    };
    text += fmt::format(
        "{:<16} {:>9.3f} {:>9.3f} {:>6.2f}  {:>10} {:>8} {:>6}   {:.3f}, {:.3f}, {:.3f}, "
        "{:.3f}{}\n",
        form, number("seconds") * 1e3, number("allowed_seconds") * 1e3, number("of_allowed"),
        over_heads("heads_over_form"), over_heads("heads_over_form_allowed"),
        over_heads("ratio_of_allowed"), number("project_seconds") * 1e3,
        number("attention_seconds") * 1e3, number("wait_seconds") * 1e3,
        number("reduce_seconds") * 1e3, row["approximate"].get<bool>() ? "  APPROXIMATE" : "");
  }
  return text;
}

void bench(Communicator& world, const std::vector<std::string>& arguments,
           const po::options_description& described) {
  Options o;
  std::optional<Sgemm> sgemm;
  Registers registers;
  together(world, [&] {
    o = read_options(parse(kName, described, arguments), world.size());
    sgemm = Sgemm::load();
    if (!sgemm) throw Failure(Exit::input, "libopenblas.so.0 cannot be loaded; install OpenBLAS");
    registers = best_registers();
  });
  const std::string heading = fmt::format(
      "# dattn {}: {}, {}, {} sequences of {} tokens, {} new, {}, weights {}, kernels "
      "for {}, OpenBLAS {}, median of {}\n",
      kVersion, kName, o.model, o.context.size(), o.context.front(), o.queries, name_of(o.type),
      name_of(o.weight_type), chosen_isa().name, sgemm->core(), o.repeats);
  measure_decode_runs(
      world, o, heading, [&](Communicator& some) { return measure(o, some, sgemm, registers); },
      table);
}

}  // namespace
}  // namespace dattn

int main(int argc, char** argv) {
  dattn::choose_blas_core(argv);
  const auto described = dattn::described_options();
  return dattn::bench_main(
      dattn::kName, argc, argv, described,
      [&](dattn::comm::Communicator& world, const std::vector<std::string>& arguments) {
        dattn::bench(world, arguments, described);
      });
}
