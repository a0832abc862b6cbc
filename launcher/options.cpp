#include "launcher/options.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <cmath>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "kernels/isa.hpp"
#include "launcher/failure.hpp"
#include "launcher/head_masks.hpp"
#include "launcher/machine_file.hpp"
#include "launcher/mask_files.hpp"
#include "launcher/output_file.hpp"
#include "launcher/report.hpp"
#include "launcher/values.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;

constexpr Index kMostStagesAhead = 1024;

std::vector<std::string> names_and_auto(auto table) {
  std::vector<std::string> names{"auto"};
  for (const auto& row : table) names.emplace_back(row.name);
  return names;
}

Index count(const po::variables_map& values, const char* name, Index fallback) {
  return values.count(name) != 0 ? values[name].as<Positive>().value : fallback;
}

Failure bad_mask(const std::string& words, const std::invalid_argument& why) {
  return {Exit::usage, "--mask " + in_quotes(words) + ": " + why.what()};
}

std::optional<Lengths> lengths_of_mask(const std::string& words) {
  try {
    return implied_lengths(words);
  } catch (const std::invalid_argument& e) {
    throw bad_mask(words, e);
  }
}

Source source_of(const po::variables_map& values) {
  const std::string q = file_name(values, "q");
  const std::string k = file_name(values, "k");
  const std::string v = file_name(values, "v");
  const bool some = values.count("q") + values.count("k") + values.count("v") > 0;
  const bool all = !q.empty() && !k.empty() && !v.empty();
  if (some && !all) {
    throw Failure(Exit::usage, "--q, --k and --v name three files; give all of them or none");
  }
  if (all) {
    for (const char* name :
         {"tokens", "queries", "heads", "kv-heads", "value-heads", "head-dim", "value-dim"}) {
      if (values.count(name) != 0) {
        throw Failure(Exit::usage, std::string("--") + name +
                                       " is for generated inputs; with --q, --k and --v the files "
                                       "say it, so leave it out");
      }
    }
    return Source::files(q, k, v);
  }
  Lengths lengths;
  if (values.count("tokens") != 0) {
    lengths.queries = lengths.keys = values["tokens"].as<Positive>().value;
  } else if (const auto implied = lengths_of_mask(values["mask"].as<std::string>())) {
    lengths = *implied;
  } else {
    throw Failure(Exit::usage,
                  "there is no input: give --q, --k and --v, or --tokens for a generated one");
  }
  Shape shape;
  shape.keys = lengths.keys;
  shape.queries = count(values, "queries", lengths.queries);
  shape.query_heads = count(values, "heads", 8);
  shape.key_heads = count(values, "kv-heads", shape.query_heads);
  shape.value_heads = count(values, "value-heads", shape.key_heads);
  shape.d_qk = count(values, "head-dim", 64);
  shape.d_v = count(values, "value-dim", shape.d_qk);
  if (const auto why = complaint(shape)) {
    throw Failure(Exit::usage, "--tokens, --heads, --kv-heads, --head-dim: " + *why);
  }
  return Source::random(shape, values["seed"].as<Count>().value);
}

}  // namespace

po::options_description problem_options() {
  po::options_description options("Problem");
  options.add_options()                                                                       //
      ("q", po::value<std::string>(), "NumPy file of Q, [tokens, heads, dim], f2, f4 or f8")  //
      ("k", po::value<std::string>(), "NumPy file of K, [tokens, key heads, dim]")            //
      ("v", po::value<std::string>(), "NumPy file of V, [tokens, value heads, value dim]")    //
      ("tokens", po::value<Positive>(),
       "generated inputs: keys, and queries, e.g. 8K [what a batch mask says]")               //
      ("queries", po::value<Positive>(), "generated: queries, the last of the tokens")        //
      ("heads", po::value<Positive>(), "generated: query heads [8]")                          //
      ("kv-heads", po::value<Positive>(), "generated: key and value heads [as --heads]")      //
      ("value-heads", po::value<Positive>(), "generated: value heads [as --kv-heads]")        //
      ("head-dim", po::value<Positive>(), "generated: numbers a head of Q and K [64]")        //
      ("value-dim", po::value<Positive>(), "generated: numbers a head of V [as --head-dim]")  //
      ("seed", po::value<Count>()->default_value({1}), "generated: which numbers")            //
      ("dtype", word({"auto", "bf16", "f4", "f8"})->default_value("auto"),
       "compute in float32; in bfloat16, to which Q, K, V and dO are rounded (O, LSE, gradients "
       "and "
       "all sums stay float32); or in float64 by the reference path [f8 for f8 files]")  //
      ("mask", po::value<std::string>()->default_value("full"),
       "which pairs count, e.g. causal or window:512,0+causal (see dattn list)")  //
      ("head-masks", po::value<std::string>(),
       "instead of --mask: JSON file that gives heads masks of their own (see README)")  //
      ("layer", po::value<Count>(), "which layer of --head-masks, if it has layers");
  return options.add(score_options());
}

po::options_description compensate_option() {
  po::options_description options("Dropped keys");
  options.add_options()  //
      ("compensate", word({"off", "head", "rank"})->default_value("off"),
       "what stands for the keys before the first query that no query of their key head sees. off: "
       "nothing; head: one pseudo-key a head, their mean and that of their values, weighted by "
       "their number (RazorAttention); rank: one for those of each rank. Forward only");
  return options;
}

po::options_description split_options(bool with_strategy) {
  po::options_description options("Split");
  if (with_strategy) {
    options.add_options()("strategy", word(names_and_auto(strategies()))->default_value("auto"),
                          "how the ranks share the work (see dattn list)");
  }
  options.add_options()  //
      ("wire", word({"exact", "bf16"})->default_value("exact"),
       "partial O and gradients travel as they are added up, in float32; or rounded to bfloat16, "
       "in "
       "half the bytes, not with float64 (LSE and all-reduces stay float32)")  //
      ("partition", word(names_and_auto(partition_kinds()))->default_value("auto"),
       "which tokens each rank owns (see dattn list)")                                   //
      ("mesh", po::value<MeshSize>(), "extents of the mesh of ranks, e.g. 2x3 for usp")  //
      ("relay", word({"auto", "on", "off"})->default_value("auto"),
       "whether what several ranks of a host need of a rank on another goes there once and on from "
       "rank to rank [on; --strategy auto: where the forecast says that it pays]")  //
      ("prefetch", po::value<Positive>(),
       "how many stages ahead keys may arrive, 1 or more; each takes the memory of one stage "
       "[1, or 2 or 4 where the forecast of up to 16 ranks says that it pays]")  //
      ("memory", po::value<Positive>(),
       "bytes that a rank may use, e.g. 8G: a backward pass keeps what the forward pass of ulysses "
       "and usp redistributed if it fits, else has it sent again [run and benches: what the host "
       "has, in equal shares; plan: any number]")  //
      ("machine", po::value<std::string>()->default_value(""),
       "what the forecast assumes: a file that dattn machine has written; or some of latency=S, "
       "bandwidth=B, rate=F, overhead=S, backward_rate=F [rate], rows=B [free], packs=B [rows], "
       "lanes=N [0], granule=N [1], net_latency=S and net_bandwidth=B (of a host's link to others, "
       "which its ranks share [as a rank's]), joined by commas, S in seconds, B in bytes a second, "
       "F in operations a second; run measures what is left out of the first three and, if "
       "anything, the backward rate, rows, packs, lanes, granule and the link between hosts");
  return options;
}

po::options_description hosts_option() {
  po::options_description options("Hosts");
  options.add_options()  //
      ("hosts", po::value<std::string>()->default_value(""),
       "which hosts the ranks are on: 2x4 (2 hosts of 4 neighbouring ranks), 2+1+3 (ranks of each) "
       "or 0,1,0,1 (the host of each rank); 1: plan as if for one host [where they are; "
       "plan: one host]");
  return options;
}

namespace {

void set_mask(const po::variables_map& values, Task& task) {
  const std::string file = file_name(values, "head-masks");
  std::optional<Index> layer;
  if (values.count("layer") != 0) layer = values["layer"].as<Count>().value;
  if (!file.empty() && !values["mask"].defaulted()) {
    throw Failure(Exit::usage, "--mask and --head-masks: give one of the two");
  }
  if (file.empty() && layer) {
    throw Failure(Exit::usage, "--layer: picks from --head-masks, which is not there");
  }
  task.mask_words =
      file.empty() ? values["mask"].as<std::string>() : read_head_masks(file, layer, task.shape);
  try {
    MaskFiles files;
    const auto open = [&](const std::string& path) { return files.open(path); };
    task.mask = parse_mask(task.mask_words, task.shape, open);
    const auto& named = files.paths();
    task.input_files.insert(task.input_files.end(), named.begin(), named.end());
    task.mask_sum = files.sum();
  } catch (const BadMaskNumbers& e) {
    const std::string option = file.empty() ? "--mask" : "--head-masks " + quoted_path(file);
    throw Failure(Exit::input, option + ": " + e.what());
  } catch (const std::invalid_argument& e) {
    if (file.empty()) throw bad_mask(task.mask_words, e);
    throw Failure(Exit::input, "--head-masks " + quoted_path(file) + ": " + e.what());
  }
}

/// Of this machine; a bad DATTN_ISA is for those to refuse who run kernels.
std::string isa_in_use() {
  try {
    return chosen_isa().name;
  } catch (const std::invalid_argument&) {
    return available_isas().front()->name;
  }
}

/// Words, or a file that stands for them.
void set_machine(const std::string& words, Task& task) {
  task.machine = words;
  if (words.empty() || words.find('=') != std::string::npos) return;
  if (::access(words.c_str(), F_OK) != 0) return;  // machine_of() complains
  const Machine machine = machine_of(read_machine_file(words), task.type, isa_in_use());
  task.input_files.push_back(words);
  task.machine = machine.text();
  task.machine_name = machine.name;
}

/// What a pseudo-key, which stands for keys at many positions, cannot have.
void refuse_without_position(const Scoring& scoring) {
  const auto refuse = [](const std::string& option, const std::string& why) {
    throw Failure(Exit::usage,
                  "--compensate with " + option + ": " + why + "; leave one of them out");
  };
  const std::string nowhere = "a pseudo-key has no position, and so no distance";
  if (!scoring.score.alibi.empty()) refuse("--alibi", nowhere);
  if (!scoring.score.bias.empty()) refuse("--relative-bias", nowhere);
  if (scoring.score.sigmoid) refuse("--sigmoid", "a pseudo-key weighs as a softmax has it");
  if (scoring.key_weights_file.named()) {
    refuse("--key-weights", "a pseudo-key is a mean of keys that weigh the same");
  }
}

}  // namespace

Task make_task(const po::variables_map& values) {
  Task task;
  task.source = source_of(values);
  const std::string d_o = file_name(values, "grad");
  if (d_o == "random") {
    task.source.add_d_o(values["seed"].as<Count>().value);
  } else if (!d_o.empty()) {
    task.source.add_d_o(d_o);
  }
  task.wish.gradients = !d_o.empty() || values.count("backward") != 0;
  for (const char* name : {"q", "k", "v", "head-masks"}) {
    task.input_files.push_back(file_name(values, name));
  }
  if (d_o != "random") task.input_files.push_back(d_o);
  task.shape = task.source.shape();
  const std::string dtype = values["dtype"].as<std::string>();
  task.type = dtype == "f8" || (dtype == "auto" && task.source.wide()) ? Type::f8
              : dtype == "bf16"                                        ? Type::bf16
                                                                       : Type::f4;
  if (task.type == Type::bf16) task.source.round_to_bfloat16();
  task.wish.wire = values["wire"].as<std::string>() == "bf16" ? Wire::bf16 : Wire::exact;
  if (task.wish.wire == Wire::bf16 && task.type == Type::f8) {
    throw Failure(Exit::usage,
                  "--wire bf16: float64 sums travel exactly; leave it out, or take --dtype f4");
  }
  if (values.count("compensate") != 0) {
    const std::string how = values["compensate"].as<std::string>();
    task.wish.compensate = how == "head"   ? Compensate::head
                           : how == "rank" ? Compensate::rank
                                           : Compensate::off;
    if (task.wish.compensate != Compensate::off && task.wish.gradients) {
      throw Failure(Exit::usage, "--compensate " + how +
                                     ": pseudo-keys have no backward pass, for training drops no "
                                     "keys; leave it out, or leave out --grad (run) or --backward "
                                     "(plan)");
    }
  }
  set_mask(values, task);
  for (const char* name : {"relative-bias", "key-weights"}) {
    task.input_files.push_back(file_name(values, name));
  }
  task.scoring = scoring_of(values, task.shape, task.type);
  if (task.wish.compensate != Compensate::off) refuse_without_position(task.scoring);
  if (values.count("strategy") != 0) task.wish.strategy = values["strategy"].as<std::string>();
  task.wish.partition = values["partition"].as<std::string>();
  if (values.count("mesh") != 0) task.wish.mesh = values["mesh"].as<MeshSize>().extents;
  const auto& relay = values["relay"].as<std::string>();
  if (relay != "auto") task.wish.relays = relay == "on";
  if (values.count("memory") != 0) task.wish.memory = values["memory"].as<Positive>().value;
  if (values.count("prefetch") != 0) {
    task.wish.prefetch =
        at_most("prefetch", values["prefetch"].as<Positive>().value, kMostStagesAhead);
  }
  if (values.count("hosts") != 0) task.hosts = values["hosts"].as<std::string>();
  if (values.count("rank-speeds") != 0) {
    task.rank_speeds = values["rank-speeds"].as<std::string>();
  }
  set_machine(values["machine"].as<std::string>(), task);
  machine_of(task.machine, {});  // complain now rather than after the set-up
  return task;
}

int at_most(const char* name, Index value, Index most) {
  if (value > most) {
    throw Failure(Exit::usage, fmt::format("--{}: at most {}, not {}", name, most, value));
  }
  return static_cast<int>(value);
}

Exit print_help(const po::options_description& options) {
  std::ostringstream text;
  text << options;
  write_text_file("-", text.str());
  return Exit::ok;
}

std::string file_name(const po::variables_map& values, const char* name) {
  if (values.count(name) == 0) return {};
  const std::string& file = values[name].as<std::string>();
  if (file.empty()) {
    throw Failure(Exit::usage, std::string("--") + name + ": the name is empty; give a file name");
  }
  return file;
}

std::string written(const std::vector<std::string>& arguments, const std::string& option) {
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].starts_with(option + "=")) return arguments[i].substr(option.size() + 1);
    if (arguments[i] != option) continue;
    const bool has_value = i + 1 < arguments.size() && !arguments[i + 1].starts_with("--");
    return has_value ? arguments[i + 1] : "given";
  }
  return "not given";
}

std::vector<std::string> with_default_files(std::vector<std::string> arguments) {
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& word = arguments[i];
    if (word != "--json" && word != "--csv" && word != "--trace") continue;
    const bool named = i + 1 < arguments.size() && !arguments[i + 1].starts_with("--");
    if (!named) arguments.insert(arguments.begin() + static_cast<std::ptrdiff_t>(i) + 1, "-");
  }
  return arguments;
}

Choice choose_for(const Task& task, int ranks, const Machine& machine) {
  Wish wish = task.wish;
  wish.ranks = ranks;
  try {
    return choose(wish, task.shape, task.mask, task.type, machine);
  } catch (const DoesNotFit&) {
    throw;
  } catch (const std::invalid_argument& e) {
    throw Failure(Exit::usage, std::string(wish.mesh ? "--mesh" : "--strategy") + ": " + e.what());
  }
}

Hosts hosts_from(const std::string& words, int ranks, const Hosts& found) {
  if (words.empty()) return found;
  try {
    return parse_hosts(words, ranks);
  } catch (const std::invalid_argument& e) {
    throw Failure(Exit::usage, std::string("--hosts: ") + escaped(e.what()));
  }
}

Machine machine_of(const std::string& words, const Machine& base) {
  try {
    return parse_machine(words, base);
  } catch (const std::invalid_argument& e) {
    const bool may_be_file = !words.empty() && words.find('=') == std::string::npos;
    throw Failure(Exit::usage, "--machine: " + escaped(e.what()) +
                                   (may_be_file ? ", nor a file that is there" : ""));
  }
}

}  // namespace dattn
