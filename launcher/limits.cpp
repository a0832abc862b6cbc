#include "launcher/limits.hpp"

#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace dattn {
namespace {

namespace fs = std::filesystem;

/// More than this is how cgroups v1 and RLIMIT_* say that there is no limit.
constexpr Index kNoLimit = Index{1} << 60;

std::optional<Index> number(const std::string& text) {
  Index value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end == text.data()) return {};
  return value;
}

/// The first word of a file, as a number; nothing if it is none ("max").
std::optional<Index> number_in(const fs::path& file) {
  std::ifstream in(file);
  std::string word;
  in >> word;
  return number(word);
}

/// The number behind the word `name` in a file of lines "name number".
std::optional<Index> number_of(const fs::path& file, const std::string& name) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string first, second;
    words >> first >> second;
    if (first == name) return number(second);
  }
  return {};
}

/// A hierarchy of cgroups that limits memory, as mounted here.
struct Hierarchy {
  bool unified = false;  ///< v2
  std::string root;      ///< the cgroup that the mount point shows
  std::string at;        ///< the mount point
};

/// Of mountinfo: "36 35 0:30 ROOT AT OPTIONS [TAGS...] - TYPE SOURCE SUPER_OPTIONS".
std::vector<Hierarchy> hierarchies(const fs::path& mountinfo) {
  std::vector<Hierarchy> all;
  std::ifstream in(mountinfo);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string skip, type, source, options;
    Hierarchy one;
    words >> skip >> skip >> skip >> one.root >> one.at;
    while (words >> skip && skip != "-") {
    }
    words >> type >> source >> options;
    one.unified = type == "cgroup2";
    const bool of_memory =
        type == "cgroup" && ("," + options + ",").find(",memory,") != std::string::npos;
    if (one.unified || of_memory) all.push_back(one);
  }
  return all;
}

/// The cgroup of this process in a hierarchy, of lines "ID:CONTROLLERS:PATH".
std::optional<std::string> cgroup_in(const fs::path& cgroups, bool unified) {
  std::ifstream in(cgroups);
  for (std::string line; std::getline(in, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool found =
        unified ? controllers == ",," : controllers.find(",memory,") != std::string::npos;
    if (found) return line.substr(second + 1);
  }
  return {};
}

/// What is left below the limit of one cgroup.
std::optional<Limit> limit_of(const fs::path& folder, bool unified) {
  const fs::path file = folder / (unified ? "memory.max" : "memory.limit_in_bytes");
  const auto most = number_in(file);
  const auto used = number_in(folder / (unified ? "memory.current" : "memory.usage_in_bytes"));
  if (!most || !used || *most >= kNoLimit) return {};
  // Pages of files that nobody has used for a while make room by themselves.
  const Index idle =
      number_of(folder / "memory.stat", unified ? "inactive_file" : "total_inactive_file")
          .value_or(0);
  return Limit{file.string(), std::clamp<Index>(*most - (*used - idle), 0, *most), true};
}

/// The cgroup and its parents up to the mount point.
void add_cgroups(const fs::path& self, std::vector<Limit>& limits) {
  for (const Hierarchy& hierarchy : hierarchies(self / "mountinfo")) {
    const auto group = cgroup_in(self / "cgroup", hierarchy.unified);
    if (!group) continue;
    // In a container that sees only its own part, paths may begin above the mount point.
    std::string below = *group;
    if (hierarchy.root != "/" && below.starts_with(hierarchy.root)) {
      below.erase(0, hierarchy.root.size());
    }
    fs::path folder = hierarchy.at;
    std::vector<fs::path> folders{folder};
    for (const fs::path& part : fs::path(below).relative_path()) {
      if (part.empty() || part == "..") continue;
      folders.push_back(folder /= part);
    }
    for (const fs::path& one : folders) {
      if (const auto limit = limit_of(one, hierarchy.unified)) limits.push_back(*limit);
    }
  }
}

void add_process(const fs::path& self, int resource, const char* name, const char* used_name,
                 std::vector<Limit>& limits) {
  rlimit most{};
  if (::getrlimit(static_cast<__rlimit_resource>(resource), &most) != 0) return;
  if (most.rlim_cur >= static_cast<rlim_t>(kNoLimit)) return;
  const auto kilobytes = number_of(self / "status", used_name);
  const Index left = static_cast<Index>(most.rlim_cur) - kilobytes.value_or(0) * 1024;
  limits.push_back({name, std::max<Index>(0, left), false});
}

}  // namespace

std::vector<Limit> memory_limits(const std::string& proc) {
  const fs::path self = fs::path(proc) / "self";
  std::vector<Limit> limits;
  if (const auto kilobytes = number_of(fs::path(proc) / "meminfo", "MemAvailable:")) {
    limits.push_back({"MemAvailable", *kilobytes * 1024, true});
  }
  add_cgroups(self, limits);
  add_process(self, RLIMIT_AS, "RLIMIT_AS", "VmSize:", limits);
  add_process(self, RLIMIT_DATA, "RLIMIT_DATA", "VmData:", limits);
  return limits;
}

Index begin_peak() {
  std::ofstream("/proc/self/clear_refs") << "5";
  return 1024 * number_of("/proc/self/status", "VmRSS:").value_or(0);
}

Index peak_bytes() { return 1024 * number_of("/proc/self/status", "VmHWM:").value_or(0); }

Index available_bytes() {
  const std::vector<Limit> limits = memory_limits();
  if (limits.empty()) return 0;
  const auto least = std::min_element(
      limits.begin(), limits.end(), [](const Limit& a, const Limit& b) { return a.left < b.left; });
  return std::max<Index>(least->left, 1);
}

std::optional<std::string> shm_note(int ranks_here, Index segment, const std::string& folder) {
  struct statvfs room {};
  if (::statvfs(folder.c_str(), &room) != 0) return {};
  const auto left = static_cast<Index>(room.f_bavail) * static_cast<Index>(room.f_frsize);
  const Index wanted = segment * ranks_here;
  if (left >= wanted) return {};
  return fmt::format(
      "{} has {} bytes left, where Open MPI wants {} for the messages of {} ranks (btl_vader); "
      "make it larger (mount -o remount,size=1G {}, docker run --shm-size 1g), or give mpirun "
      "--mca btl_vader_backing_directory DIR or --mca btl tcp,self",
      folder, left, wanted, ranks_here, folder);
}

std::optional<std::string> shm_note() {
  const auto variable = [](const char* name) {
    const char* text = std::getenv(name);
    return std::string(text == nullptr ? "" : text);
  };
  if (variable("OMPI_COMM_WORLD_LOCAL_RANK") != "0") return {};
  const std::string transports = variable("OMPI_MCA_btl");
  const bool named = transports.find("vader") != std::string::npos;
  if (!transports.empty() && named == transports.starts_with("^")) return {};
  constexpr Index kSegment = Index{4} << 20;  // of Open MPI 4.1
  const std::string folder = variable("OMPI_MCA_btl_vader_backing_directory");
  return shm_note(static_cast<int>(number(variable("OMPI_COMM_WORLD_LOCAL_SIZE")).value_or(1)),
                  number(variable("OMPI_MCA_btl_vader_segment_size")).value_or(kSegment),
                  folder.empty() ? "/dev/shm" : folder);
}

}  // namespace dattn
