#include "launcher/machine_file.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "launcher/failure.hpp"
#include "launcher/report.hpp"

namespace dattn {
namespace {

using nlohmann::json;

constexpr int kVersion = 1;

json link_json(const std::optional<Link>& link, const std::optional<double>& overlap) {
  if (!link) return nullptr;
  json j{{"latency", link->latency}, {"bandwidth", link->bandwidth}};
  if (overlap) j["overlap"] = *overlap;
  return j;
}

/// Reads a file and says what is wrong with it.
struct File {
  const std::string& path;

  [[noreturn]] void fail(const std::string& why) const {
    throw Failure(Exit::input, "--machine " + quoted_path(path) + ": " + why +
                                   "; write it afresh with dattn machine --out");
  }
  const json& field(const json& in, const char* name) const {
    const auto found = in.find(name);
    if (found == in.end()) fail(fmt::format("there is no \"{}\"", name));
    return *found;
  }
  double number(const json& in, const char* name, double least) const {
    const json& value = field(in, name);
    const double number = value.is_number() ? value.get<double>() : std::nan("");
    if (!std::isfinite(number) || number < least) {
      fail(fmt::format("\"{}\" is not a number of {} or more", name, least));
    }
    return number;
  }
  /// A rate: more than 0.
  double rate(const json& in, const char* name) const {
    const double found = number(in, name, 0);
    if (found == 0) fail(fmt::format("\"{}\" is 0", name));
    return found;
  }
  std::string word(const json& in, const char* name) const {
    const json& value = field(in, name);
    if (!value.is_string()) fail(fmt::format("\"{}\" is not a text", name));
    return value.get<std::string>();
  }
  int count(const json& in, const char* name) const {
    constexpr double kMost = 1 << 30;
    const double found = number(in, name, 1);
    if (found > kMost || found != std::floor(found)) {
      fail(fmt::format("\"{}\" is not a count", name));
    }
    return static_cast<int>(found);
  }
  std::optional<Link> link(const json& in, const char* name, std::optional<double>& overlap) const {
    const json& value = field(in, name);
    if (value.is_null()) return {};
    if (!value.is_object()) fail(fmt::format("\"{}\" is not an object", name));
    if (value.contains("overlap")) overlap = number(value, "overlap", 0);
    return Link{number(value, "latency", 0), rate(value, "bandwidth")};
  }

  /// Where a file of an earlier dattn has none.
  double number_or(const json& in, const char* name, double least) const {
    return in.contains(name) ? number(in, name, least) : least;
  }
  Grain grain(const json& in) const {
    constexpr double kMost = 4096;
    const double lanes = number_or(in, "lanes", 0);
    const double granule = number_or(in, "granule", 1);
    for (const double count : {lanes, granule}) {
      if (count > kMost || count != std::floor(count)) fail("\"lanes\" or \"granule\" is no count");
    }
    return {static_cast<Index>(lanes), static_cast<Index>(granule)};
  }

  json read() const {
    std::error_code error;
    if (!std::filesystem::is_regular_file(path, error)) {
      fail(error ? error.message() : "is not a regular file");  // a pipe could keep us for ever
    }
    std::ifstream file(path, std::ios::binary);
    constexpr std::size_t kMostBytes = 1 << 20;
    std::string text(kMostBytes + 1, '\0');
    file.read(text.data(), static_cast<std::streamsize>(text.size()));
    if (file.bad() || (!file.is_open())) fail("cannot be read");
    text.resize(static_cast<std::size_t>(file.gcount()));
    if (text.size() > kMostBytes) fail("is longer than any such file");
    // Deep nesting, which would take the parser's stack with it, is none of ours.
    if (std::count(text.begin(), text.end(), '[') > 8) fail("is not a machine's file");
    const json all = json::parse(text, nullptr, false);
    if (!all.is_object()) fail("is not a JSON object");
    return all;
  }
};

/// Those of an instruction set; float64 has none but the reference path. Null if there are none.
const MachineReport::Kernels* kernels_of(const MachineReport& report, Type type,
                                         const std::string& isa) {
  const auto found = std::find_if(report.kernels.begin(), report.kernels.end(), [&](const auto& k) {
    return k.type == type && (k.isa == isa || type == Type::f8);
  });
  return found == report.kernels.end() ? nullptr : &*found;
}

std::string in_seconds(double s) {
  return s < 1e-3 ? fmt::format("{:.2f} us", s * 1e6) : fmt::format("{:.2f} ms", s * 1e3);
}

}  // namespace

json to_json(const MachineReport& report) {
  json kernels = json::array();
  for (const auto& k : report.kernels) {
    kernels.push_back({{"isa", k.isa},
                       {"dtype", name_of(k.type)},
                       {"rate", k.rates.forward},
                       {"backward_rate", k.rates.backward},
                       {"rows", k.rates.rows},
                       {"packs", k.rates.packs},
                       {"lanes", k.rates.grain.lanes},
                       {"granule", k.rates.grain.granule}});
  }
  return {{"version", kVersion},
          {"command", "machine"},
          {"name", report.name},
          {"hosts", report.hosts},
          {"ranks", report.ranks},
          {"threads", report.threads},
          {"inside", link_json(report.links.inside, report.overlap.inside)},
          {"between", link_json(report.links.between, report.overlap.between)},
          {"memory_bytes", report.memory},
          {"isa", report.isa},
          {"kernels", kernels}};
}

std::string text(const MachineReport& report) {
  std::string out =
      fmt::format("machine: {}; {} ranks on hosts {}, {} threads a rank, {} free on a host\n",
                  report.name, report.ranks, report.hosts, report.threads,
                  report.memory > 0 ? in_bytes(report.memory) : "unknown memory");
  out += fmt::format("{:<16} {:>12} {:>14} {:>10}\n", "link", "latency", "bandwidth", "overlap");
  const auto line = [&](const char* name, const std::optional<Link>& link,
                        const std::optional<double>& overlap) {
    if (!link) return;
    out +=
        fmt::format("{:<16} {:>12} {:>11.3f} GB/s {:>8}\n", name, in_seconds(link->latency),
                    link->bandwidth / 1e9, overlap ? fmt::format("{:.0f} %", 100 * *overlap) : "");
  };
  line("inside a host", report.links.inside, report.overlap.inside);
  line("between hosts", report.links.between, report.overlap.between);
  out += fmt::format("{:<10} {:<6} {:>16} {:>16} {:>12} {:>12}   GFLOP/s a rank, GB/s of rows\n",
                     "kernels", "dtype", "forward", "backward", "rows", "keys");
  for (const auto& k : report.kernels) {
    out += fmt::format("{:<10} {:<6} {:>16.2f} {:>16.2f} {:>12} {:>12}{}\n", k.isa, name_of(k.type),
                       k.rates.forward / 1e9, k.rates.backward / 1e9,
                       k.rates.rows > 0 ? fmt::format("{:.1f}", k.rates.rows / 1e9) : "",
                       k.rates.packs > 0 ? fmt::format("{:.1f}", k.rates.packs / 1e9) : "",
                       k.isa == report.isa ? "   in use" : "");
  }
  return out;
}

MachineReport read_machine_file(const std::string& path) {
  const File file{path};
  const json all = file.read();
  if (file.number(all, "version", 0) != kVersion || file.word(all, "command") != "machine") {
    file.fail("is not what dattn machine of this version writes");
  }
  MachineReport report;
  report.name = file.word(all, "name");
  report.hosts = file.word(all, "hosts");
  report.ranks = file.count(all, "ranks");
  report.threads = file.count(all, "threads");
  report.links.inside = file.link(all, "inside", report.overlap.inside);
  report.links.between = file.link(all, "between", report.overlap.between);
  report.memory = static_cast<Index>(std::min(1e18, file.number(all, "memory_bytes", 0)));
  report.isa = file.word(all, "isa");
  const json& kernels = file.field(all, "kernels");
  if (!kernels.is_array()) file.fail("\"kernels\" is not a list");
  for (const json& k : kernels) {
    if (!k.is_object()) file.fail("\"kernels\" has something other than objects");
    MachineReport::Kernels& read = report.kernels.emplace_back();
    read.isa = file.word(k, "isa");
    const std::string type = file.word(k, "dtype");
    if (type != "bf16" && type != "f4" && type != "f8") file.fail("\"dtype\" is unknown");
    read.type = type == "bf16" ? Type::bf16 : type == "f4" ? Type::f4 : Type::f8;
    read.rates = {file.rate(k, "rate"), file.rate(k, "backward_rate"), file.number(k, "rows", 0),
                  file.number_or(k, "packs", 0), file.grain(k)};
  }
  for (const Type type : {Type::bf16, Type::f4, Type::f8}) {
    if (kernels_of(report, type, report.isa) == nullptr) {
      file.fail(fmt::format("\"kernels\" has no {} of {}", name_of(type), escaped(report.isa)));
    }
  }
  for (const MachineReport::Kernels& k : report.kernels) {
    try {
      parse_machine(machine_of(report, k.type, k.isa).text());  // holds it to the same bounds
    } catch (const std::invalid_argument& e) {
      file.fail(e.what());
    }
  }
  return report;
}

Machine machine_of(const MachineReport& report, Type type, const std::string& isa) {
  Machine machine;
  if (const auto& link = report.links.inside ? report.links.inside : report.links.between) {
    machine.latency = link->latency;
    machine.bandwidth = link->bandwidth;
  }
  if (report.links.between) {
    machine.net_latency = report.links.between->latency;
    machine.net_bandwidth = report.links.between->bandwidth;
  }
  const MachineReport::Kernels* kernel = kernels_of(report, type, isa);
  if (kernel == nullptr) kernel = kernels_of(report, type, report.isa);
  machine.rate = kernel->rates.forward;
  machine.backward_rate = kernel->rates.backward;
  machine.rows = kernel->rates.rows;
  machine.packs = kernel->rates.packs;
  set_grain(machine, kernel->rates.grain);
  machine.name = fmt::format("{}, {} kernels", report.name, kernel->isa);
  return machine;
}

}  // namespace dattn
