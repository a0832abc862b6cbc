#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdlib>
#include <set>

#include "comm/session.hpp"
#include "kernels/isa.hpp"
#include "launcher/commands.hpp"
#include "launcher/host.hpp"
#include "launcher/machine_file.hpp"
#include "launcher/options.hpp"
#include "launcher/output_file.hpp"
#include "launcher/together.hpp"
#include "launcher/values.hpp"
#include "launcher/watch.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using comm::Communicator;

po::options_description machine_options() {
  po::options_description options(
      "dattn machine: measures what forecasts need to know, with the ranks, hosts and threads of "
      "the job that it runs in");
  options.add(hosts_option())
      .add_options()  //
      ("threads", po::value<Positive>(),
       "OpenMP threads a rank [OMP_NUM_THREADS, or the host's cpus shared evenly]")  //
      ("head-dim", po::value<Positive>()->default_value({128}),
       "numbers a head of the blocks that kernels are measured on")  //
      ("out", po::value<std::string>(),
       "write what was measured as JSON, for --machine of run and plan [- for standard output]")  //
      ("help", "this text");
  return options.add(watch_options());
}

struct MachineOptions {
  std::string hosts, out;
  int threads = 0;
  Index head_dim = 128;
};

MachineOptions read_options(const po::variables_map& values) {
  MachineOptions options;
  options.hosts = values["hosts"].as<std::string>();
  options.threads = values.count("threads") != 0
                        ? at_most("threads", values["threads"].as<Positive>().value, 1024)
                        : threads_from_environment();
  options.head_dim = at_most("head-dim", values["head-dim"].as<Positive>().value, 1024);
  read_watch(values);  // the watchdog has them already; here they are checked
  options.out = file_name(values, "out");
  if (!options.out.empty() && options.out != "-") refuse_unwritable(options.out);
  try {
    chosen_isa();
  } catch (const std::invalid_argument& e) {  // DATTN_ISA names none
    throw Failure(Exit::usage, e.what() + std::string("; set it to one of these, or unset it"));
  }
  return options;
}

/// The instruction sets that all ranks have, best first.
std::vector<const Isa*> common_isas(Communicator& world) {
  std::string names = " ";
  for (const Isa* isa : available_isas()) names += std::string(isa->name) + " ";
  const std::vector<std::string> all = world.all_gather(names);
  std::vector<const Isa*> common;
  for (const Isa* isa : available_isas()) {
    const std::string name = " " + std::string(isa->name) + " ";
    if (std::all_of(all.begin(), all.end(),
                    [&](const std::string& n) { return n.find(name) != std::string::npos; })) {
      common.push_back(isa);
    }
  }
  return common;
}

/// "n0, n1, n2"; of many the first and how many more.
std::string names_of_hosts(Communicator& world) {
  std::set<std::string> seen;
  std::string names;
  constexpr std::size_t kShown = 4;
  for (const std::string& name : world.all_gather(comm::processor_name())) {
    if (!seen.insert(name).second || seen.size() > kShown) continue;
    names += (names.empty() ? "" : ", ") + name;
  }
  if (seen.size() > kShown) names += fmt::format(" and {} more", seen.size() - kShown);
  return names;
}

MachineReport measure(Communicator& world, const MachineOptions& options, const Hosts& hosts) {
  MachineReport report;
  report.name = names_of_hosts(world);
  report.hosts = hosts.text();
  report.ranks = world.size();
  report.threads = options.threads;
  std::array<std::int64_t, 1> memory{available_bytes()};
  world.all_reduce_min(memory);
  report.memory = memory[0];
  report.isa = chosen_isa().name;
  report.links = measure_links(world, hosts);
  report.overlap = overlap_of_links(world, hosts, report.links, options.threads);
  const Index tokens = Index{4096} * world.size();
  const Index heads = 8;
  const Shape shape{tokens, tokens, heads, heads, heads, options.head_dim, options.head_dim};
  for (const Isa* isa : common_isas(world)) {
    for (const Type type : {Type::bf16, Type::f4}) {
      report.kernels.push_back(
          {isa->name, type,
           measure_kernels(world, shape, type, options.threads, isa, isa->name == report.isa)});
    }
  }
  report.kernels.push_back(
      {"reference", Type::f8,
       measure_kernels(world, shape, Type::f8, options.threads, nullptr, false)});
  return report;
}

}  // namespace

Exit machine_command(const std::vector<std::string>& arguments) {
  const po::options_description described = machine_options();
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    return print_help(described);
  }
  const std::string command = "dattn machine";
  return on_all_ranks(command, early_watch(arguments), [&](Communicator& world, auto&) {
    world.phase("options");
    MachineOptions options;
    Hosts hosts;
    together(world, [&] {
      if (const auto complaint = comm::launch_complaint(
              world.size(), std::getenv("OMPI_COMM_WORLD_SIZE"), std::getenv("SLURM_NTASKS"))) {
        throw Failure(Exit::usage, *complaint);
      }
      options = read_options(parse(command, described, arguments));
      hosts = hosts_from(options.hosts, world.size(), {});
    });
    Signature fields{{"instruction set", chosen_isa().name}};
    for (const auto& option : described.options()) {
      const std::string name = "--" + option->long_name();
      fields.emplace_back(name, written(arguments, name));
    }
    try {
      require_agreement(world, fields);
    } catch (const Disagreement& e) {
      if (world.rank() == 0) complain(world.rank(), command, e.what());
      return Exit::usage;
    }
    world.phase("measurements");
    if (options.hosts.empty()) hosts = hosts_of(world);
    if (options.threads == 0) options.threads = threads_of(world, this_host());
    const MachineReport report = measure(world, options, hosts);
    agree_on_outputs(world, {options.out});
    together(world, [&] {
      if (world.rank() != 0) return;
      if (!options.out.empty()) write_text_file(options.out, to_json(report).dump(1) + "\n");
      if (options.out != "-") write_text_file("-", text(report));
    });
    return Exit::ok;
  });
}

}  // namespace dattn
