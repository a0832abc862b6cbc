// Question: how close do the local kernels come to what this machine can do?
//
// Anchors (products through OpenBLAS, AMX registers, memory read) and the kernel alternate in one
// process. A repeat whose two anchors differ by more than a tenth is dropped and made up for. The
// figure is the median over repeats of the kernel's rate over the mean of its two anchors.
//
//   bench_attend --kernel forward,backward --dtype f32,bf16 --mask full causal --head-dim 64,128
//                --threads 1 [--json]
//   bench_attend --kernel decode --dtype f32,bf16 --threads 1,2
//   bench_attend --dtype bf16 --mask causal --against-full
//   bench_attend --suite targets
#include <fmt/format.h>

#include <algorithm>
#include <boost/program_options/options_description.hpp>
#include <boost/program_options/variables_map.hpp>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "bench/anchors.hpp"
#include "bench/measure.hpp"
#include "bench/subject.hpp"
#include "launcher/failure.hpp"
#include "launcher/values.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using nlohmann::json;

constexpr const char* kToFull = "full";

std::string rules_of(const Cell& cell) {
  std::string out = cell.soft_cap > 0 ? fmt::format("soft cap {}", cell.soft_cap) : "";
  if (cell.alibi) out += out.empty() ? "alibi" : ", alibi";
  return out;
}

/// A long mask loses its middle.
std::string shown(const std::string& mask) {
  return mask.size() <= 40 ? mask : mask.substr(0, 20) + "..." + mask.substr(mask.size() - 8);
}

/// A line of output to come: a cell, and what is wanted of it.
struct Row {
  Cell cell;
  bool against_full = false;
  std::string figure = {};  ///< the ratio that counts: an anchor's name, or empty
  bool as_time = false;     ///< figure is time to the full mask's over the ratio of areas
  double floor = 0;         ///< with figure
  double goal = 0;
};

class Bench {
 public:
  Bench(Machine& machine, const Effort& effort, bool as_json)
      : machine_(machine), effort_(effort), as_json_(as_json) {}

  /// Measures and prints; whether the row reached its floor, if it has one.
  bool run(const Row& row) {
    const Cell& cell = row.cell;
    if (!row.figure.empty() && row.figure != kToFull && !machine_.has(row.figure)) {
      if (!as_json_) fmt::print("{}: left out, no {} here\n", title(cell), row.figure);
      return true;
    }
    const auto subject = make_subject(cell);
    std::unique_ptr<Subject> full;
    std::vector<Anchor> anchors;
    if (row.against_full) {
      Cell same = cell;
      same.mask = "full";
      full = make_subject(same);
      full->prepare();
      anchors.push_back({kToFull, [&] { return full->work() / full->run() / 1e9; }});
    } else {
      std::vector<const char*> names;
      if (cell.decode()) {
        names = {kToRead};
      } else {
        names = {kToSgemm};
        if (cell.dtype == "bf16") names.push_back(kToAmx);
      }
      for (const char* name : names) {
        if (!machine_.has(name)) continue;
        anchors.push_back(
            {name, [this, name, &cell] { return machine_.rate(name, cell.threads); }});
      }
    }
    const Measured measured = measure(*subject, anchors, effort_);
    const double rate = subject->work() / median(measured.seconds) / 1e9;
    const bool reached = verdict(row, measured) != "BELOW THE FLOOR";
    if (as_json_) {
      print_json(row, measured, rate);
    } else {
      print_text(row, measured, rate);
    }
    std::fflush(stdout);
    return reached;
  }

 private:
  static std::string title(const Cell& cell) {
    const std::string rules = rules_of(cell);
    return fmt::format("{} {} {} d {}:{} heads {}:{} tokens {}{} threads {} {}{}", cell.kernel,
                       cell.dtype, shown(cell.mask), cell.d, cell.dv, cell.heads, cell.kv_heads,
                       cell.tokens,
                       cell.queries != cell.tokens ? fmt::format(" queries {}", cell.queries) : "",
                       cell.threads, cell.isa->name, rules.empty() ? "" : ", " + rules);
  }

  static double figure(const Row& row, const Measured& measured) {
    const double ratio = median(measured.ratios.at(row.figure));
    return row.as_time ? 1 / ratio : ratio;
  }

  static std::string verdict(const Row& row, const Measured& measured) {
    if (row.figure.empty()) return "";
    if (measured.unsteady) return "undecided";
    const double value = figure(row, measured);
    const auto reaches = [&](double wanted) {
      return row.as_time ? value <= wanted : value >= wanted;
    };
    return reaches(row.goal) ? "goal" : reaches(row.floor) ? "floor" : "BELOW THE FLOOR";
  }

  void print_text(const Row& row, const Measured& measured, double rate) {
    const bool decode = row.cell.decode();
    fmt::print("{}: {:.1f} {}", title(row.cell), rate, decode ? "GB/s" : "GFLOP/s");
    for (const auto& [name, ratios] : measured.ratios) {
      const auto [least, most] = std::minmax_element(ratios.begin(), ratios.end());
      if (name == kToFull) {
        fmt::print(", time to full / ratio of areas {:.3f} [{:.3f} .. {:.3f}]", 1 / median(ratios),
                   1 / *most, 1 / *least);
        continue;
      }
      fmt::print(", /{} {:.3f} [{:.3f} .. {:.3f}] of {:.1f}", name, median(ratios), *least, *most,
                 median(measured.anchors.at(name)));
    }
    fmt::print(", {} repeats", measured.seconds.size());
    if (measured.dropped > 0) fmt::print(", {} dropped", measured.dropped);
    if (measured.unsteady) fmt::print(", UNSTEADY: anchors kept differing, every repeat counts");
    if (measured.foreign > 0.04) {
      fmt::print(", others took {:.0f} % of the machine", 100 * measured.foreign);
    }
    if (row.cell.poll) {
      fmt::print(", longest without poll {:.0f} us", 1e6 * median(measured.poll_gaps));
    }
    if (!row.figure.empty()) {
      fmt::print("\n    {:.3f}, floor {}, goal {}: {}", figure(row, measured), row.floor, row.goal,
                 verdict(row, measured));
    }
    fmt::print("\n");
  }

  void print_json(const Row& row, const Measured& measured, double rate) {
    const Cell& cell = row.cell;
    json out{{"kernel", cell.kernel},
             {"dtype", cell.dtype},
             {"isa", cell.isa->name},
             {"mask", cell.mask},
             {"d", cell.d},
             {"dv", cell.dv},
             {"heads", cell.heads},
             {"kv_heads", cell.kv_heads},
             {"tokens", cell.tokens},
             {"queries", cell.queries},
             {"threads", cell.threads},
             {cell.decode() ? "gbps" : "gflops", rate},
             {"ratio_sgemm", nullptr},
             {"ratio_amx", nullptr},
             {"ratio_read", nullptr},
             {"seconds", median(measured.seconds)},
             {"repeats", measured.seconds.size()},
             {"dropped", measured.dropped},
             {"unsteady", measured.unsteady},
             {"foreign", measured.foreign},
             {"rules", rules_of(cell)},
             {"corename", machine_.core()}};
    for (const auto& [name, ratios] : measured.ratios) {
      const auto [least, most] = std::minmax_element(ratios.begin(), ratios.end());
      const bool inverse = name == kToFull;
      out["ratio_" + name] = inverse ? 1 / median(ratios) : median(ratios);
      out["ratio_" + name + "_min"] = inverse ? 1 / *most : *least;
      out["ratio_" + name + "_max"] = inverse ? 1 / *least : *most;
      out["anchor_" + name] = median(measured.anchors.at(name));
    }
    if (cell.poll) out["poll_gap_us"] = 1e6 * median(measured.poll_gaps);
    if (!row.figure.empty()) {
      out["figure"] = figure(row, measured);
      out["floor"] = row.floor;
      out["goal"] = row.goal;
      out["verdict"] = verdict(row, measured);
    }
    fmt::print("{}\n", out.dump());
  }

  Machine& machine_;
  Effort effort_;
  bool as_json_;
};

/// What one thread, or one machine, should reach: floor and goal of each kind of work.
std::vector<Row> target_suite(int threads, const Isa* isa) {
  std::vector<Row> rows;
  const auto cell = [&](const char* kernel, const char* dtype, const std::string& mask, Index d) {
    Cell out;
    out.kernel = kernel;
    out.dtype = dtype;
    out.mask = mask;
    out.d = out.dv = d;
    out.threads = threads;
    out.isa = isa;
    return out;
  };
  const std::vector<Index> dims{64, 128};
  rows.reserve(32);
  for (const Index d : dims) {
    rows.push_back({cell("forward", "f32", "full", d), false, kToSgemm, false, 1.00, 1.10});
  }
  for (const Index d : dims) {
    rows.push_back({cell("forward", "f32", "causal", d), false, kToSgemm, false, 0.97, 1.08});
  }
  rows.push_back({cell("forward", "bf16", "full", 64), false, kToAmx, false, 0.19, 0.33});
  rows.push_back({cell("forward", "bf16", "full", 128), false, kToAmx, false, 0.24, 0.45});
  for (const Index d : dims) {
    rows.push_back({cell("forward", "bf16", "causal", d), true, kToFull, false, 0.87, 0.95});
  }
  for (const char* mask : {"full", "causal"}) {
    for (const Index d : dims) {
      rows.push_back({cell("backward", "f32", mask, d), false, kToSgemm, false, 0.85, 1.00});
    }
  }
  rows.push_back({cell("backward", "bf16", "full", 64), false, kToAmx, false, 0.15, 0.28});
  rows.push_back({cell("backward", "bf16", "full", 128), false, kToAmx, false, 0.18, 0.35});
  for (const char* dtype : {"f32", "bf16"}) {
    Cell decode = cell("decode", dtype, "full", 128);
    decode.heads = 32;
    decode.tokens = 32768;
    decode.queries = 1;
    rows.push_back({decode, false, kToRead, false, 0.85, 0.95});
  }
  std::string documents = "documents:512";
  for (int i = 1; i < 16384 / 512; ++i) documents += ",512";
  for (const char* dtype : {"f32", "bf16"}) {
    for (const std::string& mask : {std::string("window:511,0"), documents}) {
      Cell sparse = cell("forward", dtype, mask, 64);
      sparse.tokens = sparse.queries = 16384;
      rows.push_back({sparse, true, kToFull, true, 1.25, 1.05});
    }
  }
  return rows;
}

std::vector<Index> counts(const po::variables_map& values, const char* option) {
  return counts_of(option, values[option].as<std::string>());
}

const Isa& isa_named(const std::string& name) {
  if (name.empty()) return chosen_isa();
  std::string names;
  for (const Isa* isa : available_isas()) {
    if (isa->name == name) return *isa;
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw Failure(Exit::usage, "--isa: " + in_quotes(name) + " is not among " + names);
}

/// One line of JSON in names one cell and is answered by one line that says how long one run took.
///   {"kernel": "forward", "dtype": "f32", "mask": "full", "d": 64, ..., "threads": 8}
/// The tensors stay while the cell does. "load" and "dump" name files for tensors (Subject);
/// kernels "sgemm", "amx" and "read" are the anchors.
int serve(Machine& machine) {
  std::string line;
  std::string held_request;
  std::unique_ptr<Subject> held;
  while (std::getline(std::cin, line)) {
    json answer;
    try {
      const json request = json::parse(line);
      const std::string kernel = request.at("kernel");
      Cell cell;
      cell.threads = request.value("threads", 1);
      if (kernel == kToSgemm || kernel == kToAmx || kernel == kToRead) {
        answer["rate"] = machine.has(kernel) ? json(machine.rate(kernel, cell.threads)) : json();
      } else {
        cell.kernel = kernel;
        cell.dtype = request.value("dtype", cell.dtype);
        cell.mask = request.value("mask", cell.mask);
        cell.d = request.value("d", cell.d);
        cell.dv = request.value("dv", cell.d);
        cell.heads = request.value("heads", cell.heads);
        cell.kv_heads = request.value("kv_heads", cell.heads);
        cell.tokens = request.value("tokens", cell.tokens);
        cell.queries = request.value("queries", cell.decode() ? Index{1} : cell.tokens);
        cell.whole = true;
        cell.isa = &isa_named(request.value("isa", ""));
        if (held_request != line) {
          held.reset();
          held_request.clear();
          held = make_subject(cell);
          const json files = request.value("load", json::object());
          for (const auto& [tensor, file] : files.items()) held->load(tensor, file);
          held->prepare();
          held->run();
          held_request = line;
        }
        const double seconds = held->run();
        const json files = request.value("dump", json::object());
        for (const auto& [tensor, file] : files.items()) held->dump(tensor, file);
        answer = {{"seconds", seconds}, {"work", held->work()}, {"isa", cell.isa->name}};
      }
    } catch (const std::exception& e) {
      answer = {{"error", e.what()}};
    }
    fmt::print("{}\n", answer.dump());
    std::fflush(stdout);
  }
  return 0;
}

po::options_description bench_options() {
  po::options_description options("bench_attend");
  options.add_options()  //
      ("kernel", words({"forward", "backward", "decode"})->default_value({"forward"}, "forward"),
       "comma list: forward, backward, decode")                                                  //
      ("dtype", words({"f32", "bf16"})->default_value({"f32"}, "f32"), "comma list: f32, bf16")  //
      ("mask", po::value<std::vector<std::string>>()->multitoken()->default_value({"full"}, "full"),
       "masks, separated by spaces")  //
      ("head-dim", po::value<std::string>()->default_value("64,128"),
       "comma list (decode: 128 unless given)")                                                  //
      ("value-dim", po::value<Positive>(), "of V, if it differs")                                //
      ("heads", po::value<Positive>(), "query heads [8; decode 32]")                             //
      ("kv-heads", po::value<Positive>(), "key and value heads [heads; decode 8]")               //
      ("tokens", po::value<Positive>(), "keys [4096; decode 32768]")                             //
      ("queries", po::value<Positive>(), "query rows, the last of them [tokens; decode 1]")      //
      ("soft-cap", po::value<Finite>(), "scores become CAP tanh(score / CAP)")                   //
      ("alibi", "ALiBi slopes")                                                                  //
      ("poll", "measure the longest time between two polls")                                     //
      ("threads", po::value<std::string>()->default_value("1"), "comma list")                    //
      ("isa", po::value<std::string>()->default_value(""), "instruction set, if not the best")   //
      ("against-full", "alternate with the same kernel under the full mask instead of anchors")  //
      ("suite", word({"targets"}), "targets: rows with floor, goal and verdict")                 //
      ("repeat", po::value<Positive>()->default_value({15}), "steady repeats of a row")          //
      ("seconds", po::value<Finite>(), "of a row, at most")                                      //
      ("serve", "work on request, one JSON object a line (bench/peers)")                         //
      ("json", "one JSON object a row")("help", "this text");
  return options;
}

std::vector<Row> rows_of(const po::variables_map& values, const Isa* isa) {
  std::vector<Row> rows;
  const auto count = [&](const char* option, Index otherwise) {
    return values.count(option) != 0 ? values[option].as<Positive>().value : otherwise;
  };
  for (const Index threads : counts(values, "threads")) {
    for (const std::string& kernel : values["kernel"].as<std::vector<std::string>>()) {
      const bool decode = kernel == "decode";
      for (const std::string& dtype : values["dtype"].as<std::vector<std::string>>()) {
        for (const std::string& mask : values["mask"].as<std::vector<std::string>>()) {
          const std::vector<Index> dims = decode && values["head-dim"].defaulted()
                                              ? std::vector<Index>{128}
                                              : counts(values, "head-dim");
          for (const Index d : dims) {
            Cell cell;
            cell.kernel = kernel;
            cell.dtype = dtype;
            cell.mask = mask;
            cell.d = d;
            cell.dv = count("value-dim", d);
            cell.heads = count("heads", decode ? 32 : 8);
            cell.kv_heads = count("kv-heads", decode ? std::min<Index>(8, cell.heads) : cell.heads);
            cell.tokens = count("tokens", decode ? 32768 : 4096);
            cell.queries = count("queries", decode ? 1 : cell.tokens);
            cell.threads = static_cast<int>(threads);
            cell.soft_cap =
                values.count("soft-cap") != 0 ? values["soft-cap"].as<Finite>().value : 0;
            cell.alibi = values.count("alibi") != 0;
            cell.poll = values.count("poll") != 0;
            cell.isa = isa;
            rows.push_back({cell, values.count("against-full") != 0 && mask != "full"});
          }
        }
      }
    }
  }
  return rows;
}

int bench(int argc, char** argv) {
  const po::options_description options = bench_options();
  const std::vector<std::string> words(argv + 1, argv + argc);
  const auto values = parse("bench_attend", options, words);
  if (values.count("help") != 0) {
    std::cout << options;
    return 0;
  }
  available_isas();  // asks for the tile registers, before any thread starts
  Machine machine;
  if (values.count("serve") != 0) return serve(machine);
  const Isa& isa = isa_named(values["isa"].as<std::string>());
  std::vector<Row> rows;
  if (values.count("suite") != 0) {
    for (const Index threads : counts(values, "threads")) {
      for (Row& row : target_suite(static_cast<int>(threads), &isa)) rows.push_back(std::move(row));
    }
  } else {
    rows = rows_of(values, &isa);
  }
  const bool as_json = values.count("json") != 0;
  Effort effort;
  effort.repeats = static_cast<int>(values["repeat"].as<Positive>().value);
  if (values.count("seconds") != 0) effort.seconds = values["seconds"].as<Finite>().value;
  if (!as_json) {
    fmt::print("{}; OpenBLAS {}; AMX {}\n", isa.name,
               machine.has(kToSgemm) ? machine.core() : "missing: no ratio to SGEMM",
               machine.has(kToAmx) ? "present" : "absent");
    for (const Row& row : rows) {
      if (!row.cell.decode() || row.against_full) continue;
      fmt::print("memory read: {} MiB, {}\n", beyond_caches() >> 20U,
                 machine.read(row.cell.threads).way());
      break;
    }
  }
  Bench runner(machine, effort, as_json);
  int below = 0;
  for (const Row& row : rows) below += runner.run(row) ? 0 : 1;
  if (below > 0 && !as_json) fmt::print("{} rows below their floor\n", below);
  return 0;
}

}  // namespace
}  // namespace dattn

int main(int argc, char** argv) {
  try {
    return dattn::bench(argc, argv);
  } catch (const std::exception& e) {
    fmt::print(stderr, "bench_attend: {}\n", e.what());
    return 2;
  }
}
