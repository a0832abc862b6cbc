#pragma once

#include <string>
#include <vector>

#include "launcher/failure.hpp"
#include "launcher/program_options_fwd.hpp"
#include "launcher/scores.hpp"
#include "launcher/tensors.hpp"
#include "parallel/planner.hpp"

namespace dattn {

/// The options that say which problem to solve and how to split it; shared by run, plan and
/// benches. make_task() also looks for "grad" (a file, or random), "backward" and "compensate".
boost::program_options::options_description problem_options();
/// With "strategy", which is one strategy or auto; without, for commands that try several.
boost::program_options::options_description split_options(bool with_strategy = true);

/// The option that says what stands for dropped keys; for run and plan.
boost::program_options::options_description compensate_option();

/// The option that says which hosts the ranks are on; for run, plan and machine.
boost::program_options::options_description hosts_option();

/// A problem as the options give it, checked.
struct Task {
  Source source;
  Shape shape;
  Type type = Type::f4;
  MaskPtr mask;
  std::string mask_words;  ///< as the user wrote it
  std::string mask_sum;    ///< over what the files that it names held
  Scoring scoring;
  Wish wish;                             ///< without the number of ranks, their hosts and speeds
  std::string hosts;                     ///< --hosts, or empty
  std::string rank_speeds;               ///< --rank-speeds, or empty
  std::string machine;                   ///< --machine as parse_machine() reads it, or empty
  std::string machine_name;              ///< what it was measured on, if it is a file's
  std::vector<std::string> input_files;  ///< all that options name, which no output may replace

  /// Forward, or forward and backward.
  std::vector<Pass> passes() const { return wish.passes(); }
};

/// Failure(usage or input) if the options contradict each other, the files or the shape.
Task make_task(const boost::program_options::variables_map& values);

/// Writes what `--help` asks for to standard output.
Exit print_help(const boost::program_options::options_description& options);

/// The file that an option names; empty if it was not given, Failure(usage) if its value is empty.
std::string file_name(const boost::program_options::variables_map& values, const char* name);

/// `value` of an option; Failure(usage) if it is more than `most`.
int at_most(const char* name, Index value, Index most);

/// What the user wrote for one option, e.g. "--seed": "not given" if nothing.
std::string written(const std::vector<std::string>& arguments, const std::string& option);

/// Text outputs may be named without a file: "--json" alone means "--json -", standard output.
std::vector<std::string> with_default_files(std::vector<std::string> arguments);

/// choose(), with what strategies refuse as a Failure(usage) that names the option. Throws
/// DoesNotFit as that; choose_within() of launcher/remedy.hpp says more.
Choice choose_for(const Task& task, int ranks, const Machine& machine);

/// parse_hosts(), likewise; `found` if the option was not given.
Hosts hosts_from(const std::string& words, int ranks, const Hosts& found);

/// parse_machine(), likewise.
Machine machine_of(const std::string& words, const Machine& base);

}  // namespace dattn
