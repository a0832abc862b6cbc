#pragma once

#include <boost/program_options/options_description.hpp>
#include <boost/program_options/variables_map.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "comm/communicator.hpp"
#include "parallel/problem.hpp"

namespace dattn {

/// What benches that measure steps of decoding, of each number of ranks the first ones, let the
/// user choose.
struct DecodeRuns {
  std::vector<int> ranks;
  std::vector<Index> context;  ///< tokens of each sequence before the first step
  Index queries = 1;           ///< new tokens of each in a step
  Type type = Type::bf16;      ///< of queries and cache
  int steps = 3, repeats = 7, threads = 1;
  std::size_t read = 0;  ///< bytes that all ranks together read for the memory's rate
  std::string json;

  /// Tokens of each sequence that every step sees: none appends for the next.
  std::vector<Index> lengths() const;
};

/// Options for these, `context` ("32K" in words) by default, and --help.
void add_decode_runs(boost::program_options::options_description& options, std::int64_t context,
                     const std::string& words);

/// What they say for a job of `all` ranks. Throws Failure(usage).
DecodeRuns read_decode_runs(const boost::program_options::variables_map& values, int all);

/// Collective: rows = measure(some) on each number of ranks, the same on each of them; says the
/// heading and the table of the rows, or writes all rows into the file.
void measure_decode_runs(
    comm::Communicator& world, const DecodeRuns& runs, const std::string& heading,
    const std::function<nlohmann::ordered_json(comm::Communicator& some)>& measure,
    const std::function<std::string(const nlohmann::ordered_json& rows)>& table);

}  // namespace dattn
