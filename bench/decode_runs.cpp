#include "bench/decode_runs.hpp"

#include "bench/ceilings.hpp"
#include "bench/measure.hpp"
#include "bench/rest.hpp"
#include "launcher/options.hpp"
#include "launcher/output_file.hpp"
#include "launcher/together.hpp"

namespace dattn {

namespace po = boost::program_options;

std::vector<Index> DecodeRuns::lengths() const {
  std::vector<Index> lengths = context;
  for (Index& length : lengths) length += queries;
  return lengths;
}

void add_decode_runs(po::options_description& options, std::int64_t context,
                     const std::string& words) {
  options.add_options()                                                                       //
      ("ranks", po::value<std::string>(), "how many work, as a comma list [all of the job]")  //
      ("context", po::value<Positive>()->default_value({context}, words),
       "tokens of a sequence before the first step")                                      //
      ("batch", po::value<Positive>()->default_value({1}), "sequences")                   //
      ("new", po::value<Positive>()->default_value({1}), "new tokens of each in a step")  //
      ("dtype", word({"bf16", "f4"})->default_value("bf16"), "of queries and cache")      //
      ("steps", po::value<Positive>()->default_value({3}), "of a form in a repeat")       //
      ("repeat", po::value<Positive>()->default_value({7}), "timed repeats")              //
      ("threads", po::value<Positive>()->default_value({1}), "OpenMP threads a rank")     //
      ("read", po::value<Positive>(),
       "bytes that all ranks together read for the memory's rate [more than the caches hold]")  //
      ("json", po::value<std::string>(), "file for the rows, - for standard output")            //
      ("help", "this text");
}

DecodeRuns read_decode_runs(const po::variables_map& values, int all) {
  const auto number = [&](const char* name, Index most) {
    return at_most(name, values[name].as<Positive>().value, most);
  };
  constexpr Index kMost = 1 << 20;
  DecodeRuns runs;
  runs.ranks = ranks_listed(values, all);
  runs.context.assign(static_cast<std::size_t>(number("batch", kMost)),
                      values["context"].as<Positive>().value);
  runs.queries = number("new", kMost);
  runs.type = values["dtype"].as<std::string>() == "bf16" ? Type::bf16 : Type::f4;
  runs.steps = number("steps", 1000000);
  runs.repeats = number("repeat", 1000000);
  runs.threads = number("threads", 1024);
  runs.read = values.count("read") > 0
                  ? static_cast<std::size_t>(values["read"].as<Positive>().value)
                  : beyond_caches();
  if (values.count("json") > 0) runs.json = values["json"].as<std::string>();
  return runs;
}

void measure_decode_runs(
    comm::Communicator& world, const DecodeRuns& runs, const std::string& heading,
    const std::function<nlohmann::ordered_json(comm::Communicator& some)>& measure,
    const std::function<std::string(const nlohmann::ordered_json& rows)>& table) {
  const bool leads = world.rank() == 0;
  const bool says = leads && runs.json != "-";
  if (says) write_text_file("-", heading);
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  on_first_ranks(world, runs.ranks, [&](comm::Communicator& some) {
    const nlohmann::ordered_json measured = measure(some);
    if (says) write_text_file("-", table(measured));
    rows.insert(rows.end(), measured.begin(), measured.end());
  });
  together(world, [&] {
    if (leads && !runs.json.empty()) write_text_file(runs.json, rows.dump(1) + "\n");
  });
}

}  // namespace dattn
