#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <string>
#include <vector>

#include "launcher/options.hpp"
#include "launcher/together.hpp"

namespace dattn {

/// The main() of a bench under mpirun: prints what --help asks for, or does body(world, arguments)
/// on every rank. Gives the exit code.
template <class Body>
int bench_main(const char* name, int argc, char** argv,
               const boost::program_options::options_description& described, const Body& body) {
  try {
    const std::vector<std::string> arguments = with_default_files({argv + 1, argv + argc});
    if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
      return static_cast<int>(print_help(described));
    }
    constexpr double kPatience = 3600;  // long problems and slow links take their time
    return static_cast<int>(
        on_all_ranks(name, {.seconds = kPatience}, [&](comm::Communicator& world, auto&) {
          body(world, arguments);
          return Exit::ok;
        }));
  } catch (const std::exception& e) {
    fmt::print(stderr, "{}: {}\n", name, e.what());
    return static_cast<int>(Exit::internal);
  }
}

}  // namespace dattn
