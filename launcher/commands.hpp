#pragma once

#include <string>
#include <vector>

#include "launcher/failure.hpp"

namespace dattn {

/// The subcommands; each takes the arguments behind its name and returns how it ended. What goes
/// wrong before an MPI job exists is thrown as a Failure.
Exit run_command(const std::vector<std::string>& arguments);
Exit bench_command(const std::vector<std::string>& arguments);
Exit decode_command(const std::vector<std::string>& arguments);
Exit convert_command(const std::vector<std::string>& arguments);
Exit machine_command(const std::vector<std::string>& arguments);
Exit plan_command(const std::vector<std::string>& arguments);
Exit permute_command(const std::vector<std::string>& arguments);
Exit report_command(const std::vector<std::string>& arguments);
Exit verify_command(const std::vector<std::string>& arguments);
Exit list_command(const std::vector<std::string>& arguments);

}  // namespace dattn
