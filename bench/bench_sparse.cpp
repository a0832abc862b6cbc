// Question: does a mask that allows a tenth take a tenth of the dense mask's time, and of its
// bytes?
//
// The sparse mask and its dense one (causal, or full where queries see keys behind them) alternate
// in one process; the figure is the median over repeats of the ratio. Long dense problems are
// measured on their last rows and scaled by allowed area.
//
//   bench_sparse --mask s2:block=64,local=4,stride=8 stream --tokens 4K,32K --kernel forward,decode
//
// Under mpirun the mask is split over the ranks by a strategy and held to the ring under the dense
// mask, whole, on the same ranks in the same run; how even the ranks' shares are is told as area
// and as time of processors.
//
//   mpirun -np 4 bench_sparse --strategies gather,ring --mask stream --kernel forward,decode
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "bench/main.hpp"
#include "bench/measure.hpp"
#include "bench/sparse_ranks.hpp"
#include "launcher/host.hpp"
#include "launcher/memory.hpp"
#include "launcher/output_file.hpp"
#include "launcher/rank_report.hpp"
#include "launcher/values.hpp"
#include "parallel/decode_forms.hpp"
#include "parallel/rehearse.hpp"
#include "parallel/strategies.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;

constexpr const char* kName = "bench_sparse";
constexpr Index kDensePairs = Index{1} << 26;  // of a head and thread, that a dense repeat takes

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

/// Bytes that as many ranks would send; the plan is proved by the way.
Index bytes_of(const SparseRow& row, const std::string& mask, const char* strategy) {
  const Shape shape = row.cell.shape();
  const Problem problem(shape, parse_mask(mask, shape), line(row.ranks), "contiguous",
                        row.cell.dtype == "bf16" ? Type::bf16 : Type::f4);
  const Pass pass = row.cell.kernel == "backward" ? Pass::backward : Pass::forward;
  const Rehearsal found = rehearse(problem, make_plan(*find_strategy(strategy), problem, pass));
  if (found.fault) throw std::runtime_error(found.fault->text());
  return found.bytes_sent_total();
}

SparseRow measure(const Cell& cell, int ranks, const SparseLimits& limits) {
  const Shape shape = cell.shape();
  SparseRow row;
  row.cell = cell;
  row.ranks = ranks;
  row.dense = dense_mask(shape, cell.mask);
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
  for (int i = 0;
       i < limits.repeats && (i == 0 || limits.seconds <= 0 || now() - start < limits.seconds);
       ++i) {
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

po::options_description bench_options() {
  std::vector<std::string> names{"auto"};
  for (const Strategy& strategy : strategies()) names.emplace_back(strategy.name);
  std::vector<std::string> forms;
  for (const Strategy& form : decode_forms()) forms.emplace_back(form.name);
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
      ("threads", po::value<Positive>()->default_value({1}), "of each process")                  //
      ("ranks", po::value<Positive>(),
       "of one process: whose bytes are compared, gather under the mask with the dense ring; 1: "
       "none [4]")  //
      ("strategies", words(names)->default_value({"gather"}, "gather"),
       "under mpirun: which ones beside the dense ring, as a comma list (see dattn list)")  //
      ("forms", words(forms)->default_value({"sequence"}, "sequence"),
       "under mpirun: of decode, as a comma list")                       //
      ("repeat", po::value<Positive>()->default_value({7}), "of a row")  //
      ("seconds", po::value<Finite>(), "of a row, at most")              //
      ("json", "one JSON object a row")("help", "this text");
  return options;
}

/// What the bench was told to do.
struct Options {
  std::vector<Cell> cells;
  int ranks = 4;  ///< whose bytes a process alone compares
  std::vector<std::string> strategies, forms;
  SparseLimits limits;
  bool json = false;
};

/// Throws a Failure that names the option.
Options read_options(const po::variables_map& values, int ranks) {
  Options options;
  const auto limited = [&](const char* name, Index most) {
    return at_most(name, values[name].as<Positive>().value, most);
  };
  if (values.count("ranks") != 0) {
    options.ranks = limited("ranks", 1024);
    if (ranks > 1 && options.ranks != ranks) {
      throw Failure(Exit::usage,
                    fmt::format("--ranks: these are {}; leave it out, or start as many", ranks));
    }
  }
  const auto count = [&](const char* name) { return values[name].as<Positive>().value; };
  options.limits.repeats = limited("repeat", 1000000);
  if (values.count("seconds") != 0) options.limits.seconds = values["seconds"].as<Finite>().value;
  options.strategies = values["strategies"].as<std::vector<std::string>>();
  options.forms = values["forms"].as<std::vector<std::string>>();
  options.json = values.count("json") != 0;
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
          cell.threads = limited("threads", 1024);
          cell.isa = &chosen_isa();
          if (const auto why = complaint(cell.shape())) {
            throw Failure(Exit::usage, "--tokens, --heads, --kv-heads, --head-dim: " + *why);
          }
          try {
            parse_mask(mask, cell.shape());
          } catch (const std::invalid_argument& e) {
            throw Failure(Exit::usage, fmt::format("--mask {}: {}", in_quotes(mask), e.what()));
          }
          options.cells.push_back(std::move(cell));
        }
      }
    }
  }
  return options;
}

/// Collective: what a rank may use.
Index memory_of(comm::Communicator& world, int threads) {
  RankReport own;
  own.host = this_host();
  own.threads = threads;
  std::vector<RankReport> ranks;
  for (const std::string& text : world.all_gather(encoded(own))) ranks.push_back(decoded(text));
  return bytes_a_rank(ranks);
}

void bench(comm::Communicator& world, const std::vector<std::string>& arguments) {
  Options options;
  together(world,
           [&] { options = read_options(parse(kName, bench_options(), arguments), world.size()); });
  const auto say = [&](const SparseRow& row) {
    if (world.rank() != 0) return;
    write_text_file("-", (options.json ? to_json(row).dump() : to_text(row)) + '\n');
  };
  options.limits.memory = memory_of(world, options.cells.front().threads);
  for (const Cell& cell : options.cells) {
    if (world.size() == 1) {
      say(measure(cell, options.ranks, options.limits));
      continue;
    }
    for (const std::string& name : cell.decode() ? options.forms : options.strategies) {
      say(measure_on_ranks(world, cell, name, options.limits));
    }
  }
}

}  // namespace
}  // namespace dattn

int main(int argc, char** argv) {
  dattn::available_isas();  // asks for the tile registers, before any thread starts
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  return dattn::bench_main(
      dattn::kName, argc, argv, dattn::bench_options(),
      [&](dattn::comm::Communicator& world, const auto&) { dattn::bench(world, arguments); });
}
