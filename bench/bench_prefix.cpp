// Question: what does it save to decode a batch that shares prefixes as one problem?
//
// The batch (mask `batch`: each prefix once) takes turns in one process with as many calls of
// decode, each sequence's keys lying together with the prefixes repeated: a sample of the
// sequences, scaled. Where prefixes have several levels, also with batches of one level: the last,
// whose prefixes repeat the levels above, and the first, below which every sequence has its own
// copy. Figures are medians over repeats of the ratios.
//
//   bench_prefix --sequences 32,256 --levels 1x1024 1x16384 1x8192:8x2048 --suffix 128
#include <fmt/format.h>

#include <algorithm>
#include <boost/program_options/options_description.hpp>
#include <boost/program_options/variables_map.hpp>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "bench/measure.hpp"
#include "bench/subject.hpp"
#include "kernels/settings.hpp"
#include "launcher/failure.hpp"
#include "launcher/values.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using nlohmann::json;

/// Sequences on prefixes, in words of the mask, and the keys that one of them sees.
struct Batch {
  Index sequences = 1;
  std::string levels;
  Index suffix = 1;

  /// Groups of the last level, and the keys of all levels.
  std::pair<Index, Index> shared() const {
    std::pair<Index, Index> found{1, 0};
    const std::string words = "levels=" + levels;
    Settings settings(words, "GxL:GxL");
    for (const std::vector<Index>& level : settings.lists("levels", 1)) {
      if (level.size() != 2) throw Failure(Exit::usage, "--levels: " + levels + " is not GxL:GxL");
      found = {level[0], found.second + level[1]};
    }
    return found;
  }
  bool one_level() const { return levels.find(':') == std::string::npos; }
  /// On one level: the last.
  Batch last() const {
    const auto [groups, keys] = shared();
    return {sequences, fmt::format("{}x{}", groups, keys), suffix};
  }
  /// The first.
  Batch first() const {
    Batch found{sequences, levels.substr(0, levels.find(':')), suffix};
    found.suffix += shared().second - found.shared().second;
    return found;
  }
  std::string mask() const {
    return fmt::format("batch:sequences={},levels={},suffix={}", sequences, levels, suffix);
  }
};

struct Row {
  Batch batch;
  Cell cell;         ///< of the batch
  Index sample = 0;  ///< sequences that decode was measured on
  int repeats = 0;
  double seconds = 0;
  double alone_seconds = 0;  ///< of all sequences, one by one
  double speedup = 0;
  std::optional<double> last_seconds, first_seconds;  ///< of one level
  std::optional<double> last_saved, first_saved;      ///< of their time
  double gflops = 0;                                  ///< by allowed area
};

Row measure(const Batch& batch, Cell cell, Index sample, int repeats) {
  const auto cell_of = [&](const Batch& one) {
    const Lengths lengths = *implied_lengths(one.mask());
    Cell made = cell;
    made.whole = true;
    made.mask = one.mask();
    made.queries = lengths.queries;
    made.tokens = lengths.keys;
    return made;
  };
  Row row;
  row.batch = batch;
  row.cell = cell_of(batch);
  row.sample = std::min(sample, batch.sequences);
  row.repeats = repeats;
  Cell alone = cell;
  alone.whole = true;
  alone.kernel = "decode";
  alone.mask = "causal";
  alone.queries = 1;
  alone.tokens = batch.shared().second + batch.suffix;
  const auto together = make_subject(row.cell);
  const auto each = make_subject(alone);
  const auto last = batch.one_level() ? nullptr : make_subject(cell_of(batch.last()));
  const auto first = batch.one_level() ? nullptr : make_subject(cell_of(batch.first()));
  const auto time_alone = [&] {
    double seconds = 0;
    for (Index i = 0; i < row.sample; ++i) seconds += each->run();
    return seconds * static_cast<double>(batch.sequences) / static_cast<double>(row.sample);
  };
  together->run();  // warms up
  each->run();
  if (last) last->run();
  if (first) first->run();
  std::vector<double> found, found_alone, speedups;
  std::vector<double> found_last, found_first, last_saved, first_saved;
  for (int i = 0; i < repeats; ++i) {
    found_alone.push_back(time_alone());
    found.push_back(together->run());
    speedups.push_back(found_alone.back() / found.back());
    if (batch.one_level()) continue;
    found_last.push_back(last->run());
    last_saved.push_back(1 - found.back() / found_last.back());
    found_first.push_back(first->run());
    first_saved.push_back(1 - found.back() / found_first.back());
  }
  row.seconds = median(found);
  row.alone_seconds = median(found_alone);
  row.speedup = median(speedups);
  row.gflops = together->work() / row.seconds / 1e9;
  if (!batch.one_level()) {
    row.last_seconds = median(found_last);
    row.first_seconds = median(found_first);
    row.last_saved = median(last_saved);
    row.first_saved = median(first_saved);
  }
  return row;
}

json to_json(const Row& row) {
  const Cell& c = row.cell;
  const auto or_null = [](const std::optional<double>& x) { return x ? json(*x) : json(); };
  return {{"mask", c.mask},
          {"sequences", row.batch.sequences},
          {"levels", row.batch.levels},
          {"suffix", row.batch.suffix},
          {"dtype", c.dtype},
          {"isa", c.isa->name},
          {"heads", c.heads},
          {"kv_heads", c.kv_heads},
          {"d", c.d},
          {"threads", c.threads},
          {"seconds", row.seconds},
          {"alone_seconds", row.alone_seconds},
          {"sample", row.sample},
          {"speedup", row.speedup},
          {"last_seconds", or_null(row.last_seconds)},
          {"last_saved", or_null(row.last_saved)},
          {"first_seconds", or_null(row.first_seconds)},
          {"first_saved", or_null(row.first_saved)},
          {"gflops", row.gflops},
          {"repeats", row.repeats}};
}

std::string to_text(const Row& row) {
  const Cell& c = row.cell;
  std::string text = fmt::format(
      "{} {} sequences on {}, {} keys of their own: {:.5f} s ({:.1f} GFLOP/s) for {:.5f} s one by "
      "one ({} measured), {:.2f} times as fast",
      c.dtype, row.batch.sequences, row.batch.levels, row.batch.suffix, row.seconds, row.gflops,
      row.alone_seconds, row.sample, row.speedup);
  if (row.last_saved) {
    text += fmt::format(
        "; {:.5f} s on the last level alone, {:.3f} saved; {:.5f} s on the first, {:.3f}",
        *row.last_seconds, *row.last_saved, *row.first_seconds, *row.first_saved);
  }
  return text + fmt::format("; {} repeats", row.repeats);
}

po::options_description bench_options() {
  po::options_description options("bench_prefix");
  options.add_options()                                                               //
      ("sequences", po::value<std::string>()->default_value("32,256"), "comma list")  //
      ("levels",
       po::value<std::vector<std::string>>()->multitoken()->default_value(
           {"1x1024", "1x4096", "1x16384", "1x8192:8x2048"}, "1x1024 1x4096 1x16384 1x8192:8x2048"),
       "prefixes, as the mask batch has them, separated by spaces: groups x keys, all of a level "
       "of one length")                                                                          //
      ("suffix", po::value<Positive>()->default_value({128}), "keys of a sequence's own")        //
      ("dtype", words({"f32", "bf16"})->default_value({"f32"}, "f32"), "comma list: f32, bf16")  //
      ("heads", po::value<Positive>()->default_value({32}), "query heads")                       //
      ("kv-heads", po::value<Positive>()->default_value({8}), "key and value heads")             //
      ("head-dim", po::value<Positive>()->default_value({128}), "of Q, K and V")                 //
      ("threads", po::value<Positive>()->default_value({1}), "of this process")                  //
      ("sample", po::value<Positive>()->default_value({8}),
       "sequences that are decoded one by one, and scaled to all")       //
      ("repeat", po::value<Positive>()->default_value({7}), "of a row")  //
      ("json", "one JSON object a row")("help", "this text");
  return options;
}

int bench(int argc, char** argv) {
  const po::options_description options = bench_options();
  const std::vector<std::string> words(argv + 1, argv + argc);
  const auto values = parse("bench_prefix", options, words);
  if (values.count("help") != 0) {
    std::cout << options;
    return 0;
  }
  available_isas();  // asks for the tile registers, before any thread starts
  const auto count = [&](const char* name) { return values[name].as<Positive>().value; };
  if (count("threads") > 1024) throw Failure(Exit::usage, "--threads: at most 1024");
  for (const std::string& dtype : values["dtype"].as<std::vector<std::string>>()) {
    for (const Index sequences : counts_of("sequences", values["sequences"].as<std::string>())) {
      for (const std::string& levels : values["levels"].as<std::vector<std::string>>()) {
        Cell cell;
        cell.dtype = dtype;
        cell.d = cell.dv = count("head-dim");
        cell.heads = count("heads");
        cell.kv_heads = count("kv-heads");
        cell.threads = static_cast<int>(count("threads"));
        cell.isa = &chosen_isa();
        const Row row = measure({sequences, levels, count("suffix")}, cell, count("sample"),
                                static_cast<int>(count("repeat")));
        fmt::print("{}\n", values.count("json") != 0 ? to_json(row).dump() : to_text(row));
        std::fflush(stdout);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace dattn

int main(int argc, char** argv) {
  try {
    return dattn::bench(argc, argv);
  } catch (const std::exception& e) {
    fmt::print(stderr, "bench_prefix: {}\n", e.what());
    return 2;
  }
}
