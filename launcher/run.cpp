#include <fmt/format.h>

#include <cstdlib>

#include "comm/session.hpp"
#include "kernels/isa.hpp"
#include "launcher/commands.hpp"
#include "launcher/digests.hpp"
#include "launcher/host.hpp"
#include "launcher/job.hpp"
#include "launcher/manifest.hpp"
#include "launcher/output_file.hpp"
#include "launcher/rank_speeds.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;

po::options_description run_options() {
  po::options_description options("dattn run: computes attention over the ranks of an MPI job");
  options.add(problem_options())
      .add(key_weights_option())
      .add(compensate_option())
      .add(split_options())
      .add(hosts_option());
  options.add(speeds_option());
  po::options_description work("Work");
  work.add_options()  //
      ("threads", po::value<Positive>(),
       "OpenMP threads a rank [OMP_NUM_THREADS, or the host's cpus shared evenly]")  //
      ("repeat", po::value<Positive>()->default_value({1}),
       "timed runs; the median is reported")                                                      //
      ("warmup", po::value<Count>()->default_value({0}), "runs before those")                     //
      ("check", "compare with the double reference: all rows of a small problem, else a sample")  //
      ("windows", word({"on", "off"})->default_value("on"),
       "on: ranks of a host look at each other's memory, or copy from it once; off: all messages "
       "go through MPI");
  po::options_description gradients("Gradients");
  gradients.add_options()  //
      ("grad", po::value<std::string>(),
       "also go backward from this dO, a NumPy file shaped as O; or random: a generated one")  //
      ("dq", po::value<std::string>(), "write dQ, shaped as Q, as NumPy file; needs --grad")   //
      ("dk", po::value<std::string>(), "write dK, shaped as K, as NumPy file; needs --grad")   //
      ("dv", po::value<std::string>(), "write dV, shaped as V, as NumPy file; needs --grad");
  po::options_description output("Output");
  output.add_options()                                                                         //
      ("out", po::value<std::string>(), "write O, [tokens, heads, value dim], as NumPy file")  //
      ("lse", po::value<std::string>(), "write LSE, [tokens, heads], as NumPy file")           //
      ("json", po::value<std::string>(), "write the report as JSON [- for standard output]")   //
      ("csv", po::value<std::string>(), "write the report as CSV")                             //
      ("trace", po::value<std::string>(), "write the last run as Chrome trace, a row a rank")  //
      ("manifest", po::value<std::string>(),
       "write last, as JSON, what --q, --k, --v, --grad, --out, --lse, --dq, --dk and --dv are, "
       "with "
       "XXH3-64 digests; see dattn verify")  //
      ("help", "this text");
  options.add(work).add(gradients).add(output).add(verify_wire_option()).add(watch_options());
  return options;
}

RunOptions read_options(const po::variables_map& values) {
  RunOptions options = read_work(values);
  options.windows = values["windows"].as<std::string>() == "on";
  const auto path = [&](const char* name) { return file_name(values, name); };
  options.out = path("out");
  options.lse = path("lse");
  options.dq = path("dq");
  options.dk = path("dk");
  options.dv = path("dv");
  options.json = path("json");
  options.csv = path("csv");
  options.trace = path("trace");
  options.manifest = path("manifest");
  if (!options.manifest.empty()) require_digests("--manifest");
  for (const auto& [name, file] :
       {std::pair{"out", &options.out}, std::pair{"lse", &options.lse},
        std::pair{"dq", &options.dq}, std::pair{"dk", &options.dk}, std::pair{"dv", &options.dv},
        std::pair{"manifest", &options.manifest}}) {
    if (*file == "-") {
      throw Failure(Exit::usage, fmt::format("--{} wants a file, not '-'", name));
    }
  }
  for (const auto& [name, file] :
       {std::pair{"dq", &options.dq}, std::pair{"dk", &options.dk}, std::pair{"dv", &options.dv}}) {
    if (!file->empty() && !options.task.wish.gradients) {
      throw Failure(Exit::usage, fmt::format("--{}: there is no gradient without --grad; give a "
                                             "file of dO, or --grad random",
                                             name));
    }
  }
  if ((options.json == "-") + (options.csv == "-") + (options.trace == "-") > 1) {
    throw Failure(
        Exit::usage,
        "only one of --json, --csv and --trace can go to standard output; give the others "
        "a file");
  }
  const std::string grad = path("grad");
  options.q = path("q");
  options.k = path("k");
  options.v = path("v");
  if (grad != "random") options.grad = grad;
  const std::string outputs[] = {options.out, options.lse,   options.dq,
                                 options.dk,  options.dv,    options.json,
                                 options.csv, options.trace, options.manifest};
  refuse_same_file(options.task.input_files, outputs);
  if (!options.manifest.empty()) {
    const std::string files[] = {options.q,   options.k,  options.v,  options.grad, options.out,
                                 options.lse, options.dq, options.dk, options.dv};
    require_names(options.manifest, files);
  }
  for (const std::string& file : outputs) {
    if (!file.empty() && file != "-") refuse_unwritable(file);
  }
  try {
    chosen_isa();
  } catch (const std::invalid_argument& e) {  // DATTN_ISA names none
    throw Failure(Exit::usage, e.what() + std::string("; set it to one of these, or unset it"));
  }
  return options;
}

/// Fields in which ranks must agree: whatever changes the plan, the result or the order of
/// collectives, and every option.
Signature signature(const RunOptions& o, const po::options_description& described,
                    const std::vector<std::string>& arguments) {
  const Shape& s = o.task.shape;
  const auto number = [](auto n) { return std::to_string(n); };
  Signature fields{{"queries", number(s.queries)},
                   {"keys", number(s.keys)},
                   {"query heads", number(s.query_heads)},
                   {"key heads", number(s.key_heads)},
                   {"value heads", number(s.value_heads)},
                   {"head dim", number(s.d_qk)},
                   {"value dim", number(s.d_v)},
                   {"dtype", number(static_cast<int>(o.task.type))},
                   {"scale", fmt::format("{:a}", o.task.scoring.score.scale)},
                   {"instruction set", chosen_isa().name}};
  for (const auto& option : described.options()) {
    const std::string name = "--" + option->long_name();
    fields.emplace_back(name, written(arguments, name));
  }
  // The same names of files may stand for other masks on another rank's disk.
  fields.emplace_back("mask", o.task.mask->spec());
  fields.emplace_back("contents of the mask's files", o.task.mask_sum);
  fields.emplace_back("contents of the scores' files", o.task.scoring.files_sum);
  return fields;
}

}  // namespace

Exit run_command(const std::vector<std::string>& given) {
  const std::vector<std::string> arguments = with_default_files(given);
  const po::options_description described = run_options();
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    return print_help(described);
  }
  const std::string command = "dattn run";
  return on_all_ranks(command, early_watch(arguments), [&](Communicator& world, auto& watchdog) {
    world.phase("options");
    std::optional<RunOptions> options;
    together(world, [&] {
      if (const auto complaint = comm::launch_complaint(
              world.size(), std::getenv("OMPI_COMM_WORLD_SIZE"), std::getenv("SLURM_NTASKS"))) {
        throw Failure(Exit::usage, *complaint);
      }
      options = read_options(parse(command, described, arguments));
    });
    try {
      require_agreement(world, signature(*options, described, arguments));
    } catch (const Disagreement& e) {
      if (world.rank() == 0) complain(world.rank(), command, e.what());
      return Exit::usage;
    }
    return run_job(world, watchdog, *options);
  });
}

}  // namespace dattn
