// Question: does a mask that allows a tenth take a tenth of the dense mask's time, and of its
// bytes?
//
// The sparse mask and its dense one (causal, or full where queries see keys behind them) alternate
// in one process; the figure is the median over repeats of the ratio. Long dense problems are
// measured on their last rows and scaled by allowed area.
//
//   bench_sparse --mask s2:block=64,local=4,stride=8 stream --tokens 4K,32K --kernel forward,decode
#include <fmt/format.h>

#include <algorithm>
#include <boost/program_options/options_description.hpp>
#include <boost/program_options/variables_map.hpp>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "bench/measure.hpp"
#include "bench/subject.hpp"
#include "kernels/area.hpp"
#include "launcher/failure.hpp"
#include "launcher/values.hpp"
#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using nlohmann::json;

constexpr Index kDensePairs = Index{1} << 26;  // of a head and thread, that a dense repeat takes
constexpr double kLeastSeconds = 0.02;         // shorter work runs several times a repeat

/// Allowed (head, query, key) triples.
double area_of(const Shape& shape, const std::string& words) {
  const MaskPtr mask = parse_mask(words, shape);
  double sum = 0;
  for (const auto& [head, count] : variants(*mask, {0, shape.query_heads})) {
    const Index pairs =
        area(*mask, head, {{shape.first_query(), shape.queries, 1}}, {{0, shape.keys, 1}});
    sum += static_cast<double>(pairs) * static_cast<double>(count);
  }
  return sum;
}

/// Whether some query sees a key behind it.
bool looks_ahead(const Shape& shape, const Mask& mask) {
  std::vector<Range> spans;
  for (const auto& [head, count] : variants(mask, {0, shape.query_heads})) {
    for (Index q = shape.first_query(); q + 1 < shape.keys; ++q) {
      spans.clear();
      mask.spans(head, q, {q + 1, shape.keys}, spans);
      if (!spans.empty()) return true;
    }
  }
  return false;
}

/// Seconds of one run; the mean of several where they are short.
struct Timed {
  explicit Timed(const Cell& cell) : subject(make_subject(cell)) {
    subject->prepare();
    subject->run();  // warms up
    times = std::max(1, static_cast<int>(std::ceil(kLeastSeconds / subject->run())));
  }
  double run() const {
    double seconds = 0;
    for (int i = 0; i < times; ++i) seconds += subject->run();
    return seconds / times;
  }
  std::unique_ptr<Subject> subject;
  int times = 1;
};

struct Row {
  Cell cell;
  std::string dense;  ///< the dense mask
  Index dense_rows = 0;
  double density = 0;
  double seconds = 0;
  double dense_seconds = 0;  ///< of all rows
  double speedup = 0;
  int repeats = 0;
  Index ranks = 0;
  std::optional<Index> bytes, dense_bytes;  ///< of all ranks

  double of_ideal() const { return speedup * density; }
};

/// Bytes that all ranks send; the plan is proved by the way.
Index bytes_of(const Row& row, const std::string& mask, const char* strategy) {
  const Shape shape = row.cell.shape();
  const Problem problem(shape, parse_mask(mask, shape), line(static_cast<int>(row.ranks)),
                        "contiguous", row.cell.dtype == "bf16" ? Type::bf16 : Type::f4);
  const Pass pass = row.cell.kernel == "backward" ? Pass::backward : Pass::forward;
  const Rehearsal found = rehearse(problem, make_plan(*find_strategy(strategy), problem, pass));
  if (found.fault) throw std::runtime_error(found.fault->text());
  return found.bytes_sent_total();
}

Row measure(const Cell& cell, Index ranks, int repeats, double seconds) {
  const Shape shape = cell.shape();
  Row row;
  row.cell = cell;
  row.ranks = ranks;
  row.dense = looks_ahead(shape, *parse_mask(cell.mask, shape)) ? "full" : "causal";
  Cell dense = cell;
  dense.mask = row.dense;
  dense.queries = std::clamp<Index>(kDensePairs / cell.tokens * cell.threads, 1, cell.queries);
  row.dense_rows = dense.queries;
  const double dense_area = area_of(shape, row.dense);
  row.density = area_of(shape, cell.mask) / dense_area;
  const double scale = dense_area / area_of(dense.shape(), row.dense);
  const Timed sparse(cell);
  const Timed whole(dense);
  std::vector<double> found;
  std::vector<double> whole_found;
  std::vector<double> ratios;
  const double start = now();
  double before = whole.run();
  for (int i = 0; i < repeats && (i == 0 || seconds <= 0 || now() - start < seconds); ++i) {
    found.push_back(sparse.run());
    const double after = whole.run();
    whole_found.push_back(scale * (before + after) / 2);
    ratios.push_back(whole_found.back() / found.back());
    before = after;
  }
  row.repeats = static_cast<int>(ratios.size());
  row.seconds = median(found);
  row.dense_seconds = median(whole_found);
  row.speedup = median(ratios);
  if (ranks > 1 && !cell.decode()) {
    row.bytes = bytes_of(row, cell.mask, "gather");
    row.dense_bytes = bytes_of(row, row.dense, "ring");
  }
  return row;
}

json to_json(const Row& row) {
  const Cell& c = row.cell;
  const auto or_null = [](const std::optional<Index>& x) { return x ? json(*x) : json(); };
  return {{"mask", c.mask},
          {"dense", row.dense},
          {"kernel", c.kernel},
          {"dtype", c.dtype},
          {"isa", c.isa->name},
          {"tokens", c.tokens},
          {"heads", c.heads},
          {"kv_heads", c.kv_heads},
          {"d", c.d},
          {"threads", c.threads},
          {"density", row.density},
          {"seconds", row.seconds},
          {"dense_seconds", row.dense_seconds},
          {"dense_rows", row.dense_rows},
          {"speedup", row.speedup},
          {"of_ideal", row.of_ideal()},
          {"repeats", row.repeats},
          {"ranks", row.ranks},
          {"bytes", or_null(row.bytes)},
          {"dense_bytes", or_null(row.dense_bytes)}};
}

std::string to_text(const Row& row) {
  const Cell& c = row.cell;
  std::string text = fmt::format(
      "{} {} {} tokens {}: density {:.4f}, {:.5f} s for {:.5f} s ({}, {} rows), {:.2f} times as "
      "fast, {:.3f} of ideal, {} repeats",
      c.kernel, c.dtype, c.mask, c.tokens, row.density, row.seconds, row.dense_seconds, row.dense,
      row.dense_rows, row.speedup, row.of_ideal(), row.repeats);
  if (row.bytes) {
    text += fmt::format("; {} ranks send {} bytes for {}, {:.4f}", row.ranks, *row.bytes,
                        *row.dense_bytes,
                        static_cast<double>(*row.bytes) / static_cast<double>(*row.dense_bytes));
  }
  return text;
}

po::options_description bench_options() {
  po::options_description options("bench_sparse");
  options.add_options()  //
      ("mask",
       po::value<std::vector<std::string>>()->multitoken()->default_value(
           {"s2:block=64,local=4,stride=8", "stream:sink=64,recent=256", "window:511,0"},
           "s2, stream, window:511,0"),
       "masks, separated by spaces")  //
      ("kernel", words({"forward", "backward", "decode"})->default_value({"forward"}, "forward"),
       "comma list: forward, backward, decode")                                                  //
      ("dtype", words({"f32", "bf16"})->default_value({"f32"}, "f32"), "comma list: f32, bf16")  //
      ("tokens", po::value<std::string>()->default_value("4K,16K,32K"), "comma list")            //
      ("heads", po::value<Positive>()->default_value({8}), "query heads")                        //
      ("kv-heads", po::value<Positive>(), "key and value heads [heads]")                         //
      ("head-dim", po::value<Positive>()->default_value({64}), "of Q, K and V")                  //
      ("threads", po::value<Positive>()->default_value({1}), "of this process")                  //
      ("ranks", po::value<Positive>()->default_value({4}),
       "whose bytes are compared, gather under the mask with the dense ring; 1: none")  //
      ("repeat", po::value<Positive>()->default_value({7}), "of a row")                 //
      ("seconds", po::value<Finite>(), "of a row, at most")                             //
      ("json", "one JSON object a row")("help", "this text");
  return options;
}

int bench(int argc, char** argv) {
  const po::options_description options = bench_options();
  const std::vector<std::string> words(argv + 1, argv + argc);
  const auto values = parse("bench_sparse", options, words);
  if (values.count("help") != 0) {
    std::cout << options;
    return 0;
  }
  available_isas();  // asks for the tile registers, before any thread starts
  const auto count = [&](const char* name) { return values[name].as<Positive>().value; };
  if (count("ranks") > 1024) throw Failure(Exit::usage, "--ranks: at most 1024");
  if (count("threads") > 1024) throw Failure(Exit::usage, "--threads: at most 1024");
  for (const std::string& kernel : values["kernel"].as<std::vector<std::string>>()) {
    for (const std::string& dtype : values["dtype"].as<std::vector<std::string>>()) {
      for (const std::string& mask : values["mask"].as<std::vector<std::string>>()) {
        for (const Index tokens : counts_of("tokens", values["tokens"].as<std::string>())) {
          Cell cell;
          cell.kernel = kernel;
          cell.dtype = dtype;
          cell.mask = mask;
          cell.d = cell.dv = count("head-dim");
          cell.heads = count("heads");
          cell.kv_heads = values.count("kv-heads") != 0 ? count("kv-heads") : cell.heads;
          cell.tokens = tokens;
          cell.queries = kernel == "decode" ? 1 : tokens;
          cell.threads = static_cast<int>(count("threads"));
          cell.isa = &chosen_isa();
          const double seconds =
              values.count("seconds") != 0 ? values["seconds"].as<Finite>().value : 0;
          const Row row = measure(cell, count("ranks"), static_cast<int>(count("repeat")), seconds);
          fmt::print("{}\n", values.count("json") != 0 ? to_json(row).dump() : to_text(row));
          std::fflush(stdout);
        }
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
    fmt::print(stderr, "bench_sparse: {}\n", e.what());
    return 2;
  }
}
