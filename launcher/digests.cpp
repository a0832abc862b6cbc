#include "launcher/digests.hpp"

#include <boost/program_options/options_description.hpp>
#include <boost/program_options/value_semantic.hpp>
#include <boost/program_options/variables_map.hpp>
#include <fmt/format.h>

#include "comm/digest.hpp"
#include "launcher/failure.hpp"

namespace dattn {

namespace po = boost::program_options;

po::options_description verify_wire_option() {
  po::options_description options("When bytes are changed");
  options.add_options()  //
      ("verify-wire",
       "every message carries an XXH3-64 digest, which its receiver compares before it uses a "
       "byte; "
       "what memory or the network has changed ends the job, with 74");
  return options;
}

bool verifies_wire(const po::variables_map& values) {
  if (values.count("verify-wire") == 0) return false;
  require_digests("--verify-wire");
  return true;
}

void require_digests(const char* option) {
  if (comm::has_digest()) return;
  throw Failure(Exit::usage,
                fmt::format("{}: this dattn was built without xxHash; install libxxhash-dev "
                            "(launcher/setup does), configure with cmake --fresh and build again",
                            option));
}

std::string digests_line() {
  if (comm::has_digest())
    return "with xxHash " + comm::digest_version() + ": --verify-wire, --manifest";
  return "without xxHash (Debian: libxxhash-dev): no --verify-wire, no --manifest";
}

}  // namespace dattn
