// Question: how much of what all ranks together can read from memory does a step of decoding reach,
// keys and values of a long cache split over ranks in each form?
//
//   mpirun -np 16 --bind-to core build/release/bench/bench_decode --context 128K --ranks 1,8,16
//                 --forms tree,helix --dtype bf16 --json decode.json
//
// Of each number of ranks the first ones of the job work and the others sleep. A repeat measures
// what all of these read at once, runs some steps of each form, and measures it again: ratios are
// of one repeat.
#include <fmt/format.h>

#include <array>

#include "bench/ceilings.hpp"
#include "bench/decode_runs.hpp"
#include "bench/main.hpp"
#include "bench/measure.hpp"
#include "kernels/isa.hpp"
#include "launcher/calibrate.hpp"
#include "launcher/values.hpp"
#include "launcher/version.hpp"
#include "parallel/decoder.hpp"
#include "parallel/latent_parts.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;

constexpr const char* kName = "bench_decode";

struct Options : DecodeRuns {
  std::vector<std::string> forms;
  Decoding decoding;  ///< of what every step sees
  bool by_speed = false;
};

po::options_description described_options() {
  std::vector<std::string> forms;
  for (const Strategy& form : decode_forms()) forms.emplace_back(form.name);
  po::options_description options(
      "bench_decode: steps of decoding against a KV cache, over ranks in each form");
  options.add_options()  //
      ("forms", words(forms)->default_value({"tree", "helix"}, "tree,helix"),
       "which ones, as a comma list")                                                 //
      ("heads", po::value<Positive>()->default_value({32}), "query heads")            //
      ("kv-heads", po::value<Positive>()->default_value({8}), "key and value heads")  //
      ("head-dim", po::value<Positive>()->default_value({128}), "numbers a head")     //
      ("by-speed", "also with tokens dealt by measured speeds, as dattn decode --rank-speeds does");
  add_decode_runs(options, 131072, "128K");
  return options;
}

Options read_options(const po::variables_map& values, int ranks) {
  const auto number = [&](const char* name) {
    return at_most(name, values[name].as<Positive>().value, 1 << 20);
  };
  Options o;
  static_cast<DecodeRuns&>(o) = read_decode_runs(values, ranks);
  o.forms = values["forms"].as<std::vector<std::string>>();
  o.by_speed = values.count("by-speed") > 0;
  Decoding& d = o.decoding;
  d.capacity = o.lengths();
  d.queries = o.queries;
  d.query_heads = number("heads");
  d.key_heads = d.value_heads = number("kv-heads");
  d.d_qk = d.d_v = number("head-dim");
  d.type = o.type;
  if (const auto why = complaint(d)) throw Failure(Exit::usage, *why);
  return o;
}

/// One form on some ranks.
struct Subject {
  std::string form;
  std::string refused;  ///< why it has no figures
  std::unique_ptr<Decoder<Communicator>> decoder;
  double bytes = 0;  ///< of the cache, of all ranks: a step reads each once
  RunTimes last;
  // Of each repeat: of the slowest rank, and the part that all ranks read of what they can.
  std::vector<double> seconds, of_read, of_slowest, compute, wait;
  std::vector<double> own;  ///< this rank's time in kernels and merges, of each step
};

template <class T>
void draw(Decoder<Communicator>& decoder) {
  const Decoding& d = decoder.decoding();
  KvCache& cache = decoder.cache();
  for (Index position = 0; position < d.keys(); ++position) {
    const auto row = cache.row_of(position);
    if (!row) continue;
    const auto fill = [&](std::byte* to, Kind kind, std::uint64_t seed) {
      draw_numbers(reinterpret_cast<T*>(to), cache.row_bytes(kind) / static_cast<Index>(sizeof(T)),
                   seed);
    };
    fill(cache.keys(*row), Kind::K, static_cast<std::uint64_t>(2 * position));
    fill(cache.values(*row), Kind::V, static_cast<std::uint64_t>(2 * position + 1));
  }
  const std::span<std::byte> queries = decoder.queries();
  draw_numbers(reinterpret_cast<T*>(queries.data()),
               std::ssize(queries) / static_cast<Index>(sizeof(T)), 1);
}

Subject made(const std::string& form, const Options& o, const Decoding& decoding,
             Communicator& ranks) {
  Subject subject;
  subject.form = form;
  try {
    subject.decoder =
        std::make_unique<Decoder<Communicator>>(decoding, *find_decode_form(form), std::nullopt,
                                                ranks, EngineOptions{.threads = o.threads});
  } catch (const std::invalid_argument& e) {  // on all ranks alike
    subject.refused = e.what();
    return subject;
  }
  o.decoding.type == Type::bf16 ? draw<BFloat16>(*subject.decoder) : draw<float>(*subject.decoder);
  return subject;
}

/// The steps of a repeat: of the one in the middle the slowest rank's time, compute and waiting.
std::array<double, 3> run(Subject& subject, const Options& o, Communicator& ranks) {
  std::vector<std::array<double, 3>> all;
  for (int i = 0; i < o.steps; ++i) {
    ranks.barrier();
    subject.last = subject.decoder->step(o.decoding.capacity);
    subject.own.push_back(subject.last.compute);
    std::array<double, 3> most{subject.last.seconds, subject.last.compute, subject.last.wait};
    ranks.all_reduce_max(most);
    all.push_back(most);
  }
  std::nth_element(all.begin(), all.begin() + o.steps / 2, all.end());
  return all[static_cast<std::size_t>(o.steps / 2)];
}

/// Median of what each rank has seen, by rank.
std::vector<double> each_ranks(const std::vector<double>& own, Communicator& ranks) {
  std::vector<double> all;
  for (const std::string& text : ranks.all_gather(fmt::format("{:a}", median(own)))) {
    all.push_back(std::strtod(text.c_str(), nullptr));
  }
  return all;
}

/// All forms on these ranks: rows, the same on each.
nlohmann::ordered_json measure(const Options& o, Communicator& ranks) {
  std::vector<Subject> subjects;
  std::optional<MemoryRead> read;
  std::vector<Decoding> decodings{o.decoding};
  if (o.by_speed) {
    const Decoding& d = o.decoding;
    const Shape like{1, d.keys(), d.query_heads, d.key_heads, d.value_heads, d.d_qk, d.d_v};
    decodings.push_back(d);
    decodings.back().speeds = measure_decode_speeds(ranks, like, d.type, o.threads);
  }
  together(ranks, [&] {
    for (const std::string& form : o.forms) {
      for (const Decoding& d : decodings) subjects.push_back(made(form, o, d, ranks));
    }
    read.emplace(o.threads, o.read / static_cast<std::size_t>(ranks.size()));
  });
  for (Subject& s : subjects) {
    if (s.decoder == nullptr) continue;
    std::array<double, 1> sum{
        static_cast<double>(s.decoder->cache().bytes(o.decoding.capacity, o.decoding))};
    ranks.all_reduce_sum(sum);
    s.bytes = sum[0];
  }
  std::vector<double> own_rates;
  // Of all ranks added up; and what it would be if all were as slow as the slowest.
  const auto rate = [&] {
    ranks.barrier();
    const double own = read->gbps();
    own_rates.push_back(own);
    std::array<double, 1> sum{own};
    std::array<double, 1> slowest{-own};
    ranks.all_reduce_sum(sum);
    ranks.all_reduce_max(slowest);
    return std::array{sum[0], -slowest[0] * ranks.size()};
  };
  std::vector<double> rates;
  for (int repeat = -1; repeat < o.repeats; ++repeat) {  // the first one warms up
    for (Subject& s : subjects) {
      if (s.decoder == nullptr) continue;
      const std::array<double, 2> before = rate();
      const std::array<double, 3> figures = run(s, o, ranks);
      const std::array<double, 2> after = rate();
      if (repeat < 0) {
        s.own.clear();
        own_rates.clear();
        continue;
      }
      const double gbps = s.bytes / figures[0] / 1e9;
      rates.push_back((before[0] + after[0]) / 2);
      s.seconds.push_back(figures[0]);
      s.compute.push_back(figures[1]);
      s.wait.push_back(figures[2]);
      s.of_read.push_back(gbps / rates.back());
      s.of_slowest.push_back(2 * gbps / (before[1] + after[1]));
    }
  }
  nlohmann::ordered_json out = nlohmann::ordered_json::array();
  for (const Subject& s : subjects) {
    nlohmann::ordered_json row{{"ranks", ranks.size()},
                               {"threads", o.threads},
                               {"form", s.form},
                               {"dtype", name_of(o.decoding.type)},
                               {"heads", o.decoding.query_heads},
                               {"kv_heads", o.decoding.key_heads},
                               {"d", o.decoding.d_qk},
                               {"context", o.context.front()},
                               {"batch", o.context.size()},
                               {"new_tokens", o.decoding.queries},
                               {"isa", chosen_isa().name},
                               {"refused", nullptr}};
    if (s.decoder == nullptr) {
      row["refused"] = s.refused;
      out.push_back(row);
      continue;
    }
    std::array<std::int64_t, 3> sums{s.last.bytes_sent, s.last.messages, s.last.collectives};
    ranks.all_reduce_sum(std::span<std::int64_t>(sums));
    row["mesh"] = s.decoder->problem().mesh().text();
    row["rank_speeds"] = s.decoder->decoding().speeds.text();
    row["repeats"] = o.repeats;
    row["seconds"] = median(s.seconds);
    row["kv_bytes"] = s.bytes;
    row["gbps"] = s.bytes / median(s.seconds) / 1e9;
    row["read_gbps"] = median(rates);
    row["of_read"] = median(s.of_read);
    row["of_read_slowest"] = median(s.of_slowest);
    row["compute_seconds"] = median(s.compute);
    row["wait_seconds"] = median(s.wait);
    row["rank_seconds"] = each_ranks(s.own, ranks);
    row["rank_read_gbps"] = each_ranks(own_rates, ranks);
    row["bytes_sent"] = sums[0];
    row["messages"] = sums[1];
    row["collectives_rank"] = sums[2] / ranks.size();
    out.push_back(row);
  }
  return out;
}

std::string table(const nlohmann::ordered_json& rows) {
  std::string text = fmt::format("\n{:>5} {:<10} {:>9} {:>8} {:>8} {:>8} {:>10}   {}\n", "ranks",
                                 "form", "ms", "GB/s", "can read", "of it", "of slowest",
                                 "compute, waiting of the slowest rank, ms; messages");
  for (const auto& row : rows) {
    const auto form = row["form"].get<std::string>();
    if (!row["refused"].is_null()) {
      text += fmt::format("{:>5} {:<10} refused: {}\n", row["ranks"].get<int>(), form,
                          row["refused"].get<std::string>());
      continue;
    }
    const auto number = [&](const char* name) { return row[name].get<double>(); };
    const auto speeds = row["rank_speeds"].get<std::string>();
    text += fmt::format(
        "{:>5} {:<10} {:>9.3f} {:>8.1f} {:>8.1f} {:>8.2f} {:>10.2f}   {:.3f}, {:.3f}; {}{}\n",
        row["ranks"].get<int>(), form, number("seconds") * 1e3, number("gbps"), number("read_gbps"),
        number("of_read"), number("of_read_slowest"), number("compute_seconds") * 1e3,
        number("wait_seconds") * 1e3, row["messages"].get<std::int64_t>(),
        speeds == "1" ? "" : "; by speed " + speeds);
  }
  return text;
}

void bench(Communicator& world, const std::vector<std::string>& arguments,
           const po::options_description& described) {
  Options o;
  together(world, [&] { o = read_options(parse(kName, described, arguments), world.size()); });
  const std::string heading = fmt::format(
      "# dattn {}: {}, {} sequences of {} tokens, {} new, {}:{} heads of {}, {}, kernels for {}, "
      "median of {}\n",
      kVersion, kName, o.context.size(), o.context.front(), o.queries, o.decoding.query_heads,
      o.decoding.key_heads, o.decoding.d_qk, name_of(o.type), chosen_isa().name, o.repeats);
  measure_decode_runs(
      world, o, heading, [&](Communicator& some) { return measure(o, some); }, table);
}

}  // namespace
}  // namespace dattn

int main(int argc, char** argv) {
  const auto described = dattn::described_options();
  return dattn::bench_main(
      dattn::kName, argc, argv, described,
      [&](dattn::comm::Communicator& world, const std::vector<std::string>& arguments) {
        dattn::bench(world, arguments, described);
      });
}
