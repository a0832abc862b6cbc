// dattn verify: whether the files of a run are still what its manifest says.
#include <fmt/format.h>

#include <algorithm>

#include "launcher/commands.hpp"
#include "launcher/digests.hpp"
#include "launcher/manifest.hpp"
#include "launcher/output_file.hpp"

namespace dattn {

Exit verify_command(const std::vector<std::string>& arguments) {
  constexpr const char* kHelp =
      "dattn verify MANIFEST: whether the files that dattn run --manifest MANIFEST has read and\n"
      "written are still the same: type, shape, and the XXH3-64 digests of each rank's rows. Exit\n"
      "code 0 if all are, 74 if one has changed or is missing.\n";
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    write_text_file("-", kHelp);
    return Exit::ok;
  }
  if (arguments.size() != 1 || arguments.front().starts_with("-")) {
    throw Failure(Exit::usage,
                  "dattn verify wants one manifest, dattn verify MANIFEST; dattn run --manifest "
                  "writes it");
  }
  require_digests("dattn verify");
  bool right = true;
  std::string text;
  for (const ManifestLine& line : verified_manifest(arguments.front())) {
    right = right && line.right;
    text += fmt::format("{} {}\n", line.right ? "ok     " : "CHANGED", line.text);
  }
  write_text_file("-", text);
  return right ? Exit::ok : Exit::corrupt;
}

}  // namespace dattn
