#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "kernels/shape.hpp"
#include "launcher/calibrate.hpp"
#include "launcher/links.hpp"

namespace dattn {

/// What `dattn machine` has measured, and its file holds.
struct MachineReport {
  std::string name;   ///< names of the hosts
  std::string hosts;  ///< as Hosts::text()
  int ranks = 1;
  int threads = 1;
  Links links;
  Overlap overlap;
  Index memory = 0;  ///< bytes that new work can have on the host that has least; 0: unknown
  std::string isa;   ///< the instruction set in use when it was measured
  struct Kernels {
    std::string isa;
    Type type = Type::f4;
    KernelRates rates;
  };
  std::vector<Kernels> kernels;
};

nlohmann::json to_json(const MachineReport& report);
/// The table for people.
std::string text(const MachineReport& report);

/// The file as it was written; Failure(input), naming --machine, if it is none of these.
MachineReport read_machine_file(const std::string& path);

/// What a Forecast knows of it: kernels of this type, of the instruction set `isa` if it was
/// measured, else of the one that was in use then.
Machine machine_of(const MachineReport& report, Type type, const std::string& isa);

}  // namespace dattn
