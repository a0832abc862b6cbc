// What /proc and the cgroups say, from folders that look like them.
#include "launcher/limits.hpp"

#include <gmock/gmock.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

namespace dattn {
namespace {

namespace fs = std::filesystem;

class Limits : public testing::Test {
 protected:
  Limits() : root_(fs::path(testing::TempDir()) / ("limits" + std::to_string(::getpid()))) {
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    7000 kB\n");
    write("proc/self/status", "VmSize:\t 100 kB\nVmData:\t 50 kB\n");
  }
  ~Limits() override { fs::remove_all(root_); }

  void write(const std::string& file, const std::string& text) {
    fs::create_directories((root_ / file).parent_path());
    std::ofstream(root_ / file) << text;
  }
  /// The cgroup `group` of v2, mounted at `cg`.
  void v2(const std::string& group, const std::string& most, Index used, Index idle = 0) {
    write("cg" + group + "/memory.max", most + "\n");
    write("cg" + group + "/memory.current", std::to_string(used) + "\n");
    write("cg" + group + "/memory.stat", "anon 1\ninactive_file " + std::to_string(idle) + "\n");
  }
  void v1(const std::string& group, const std::string& most, Index used, Index idle = 0) {
    write("mem" + group + "/memory.limit_in_bytes", most + "\n");
    write("mem" + group + "/memory.usage_in_bytes", std::to_string(used) + "\n");
    write("mem" + group + "/memory.stat",
          "inactive_file 1\ntotal_inactive_file " + std::to_string(idle) + "\n");
  }
  std::string mount(const std::string& root, const std::string& at, bool unified) {
    return "30 24 0:26 " + root + " " + (root_ / at).string() + " rw,nosuid shared:9 - " +
           (unified ? "cgroup2 cgroup2 rw\n" : "cgroup cgroup rw,memory\n");
  }
  /// What is left by the last part of each shared limit's name.
  std::vector<std::pair<std::string, Index>> shared() const {
    std::vector<std::pair<std::string, Index>> all;
    for (const Limit& limit : memory_limits((root_ / "proc").string())) {
      if (!limit.shared) continue;
      const bool file = limit.name.find('/') != std::string::npos;
      all.emplace_back(file ? fs::relative(limit.name, root_).string() : limit.name, limit.left);
    }
    return all;
  }
  using Left = std::vector<std::pair<std::string, Index>>;

  fs::path root_;
};

TEST_F(Limits, WithoutCgroupsThereIsWhatTheSystemHas) {
  EXPECT_EQ(shared(), (Left{{"MemAvailable", 7000 * 1024}}));
  fs::remove_all(root_ / "proc");
  EXPECT_EQ(shared(), Left{});
}

TEST_F(Limits, V2CountsAllParentsAndWhatFilesGiveBack) {
  write("proc/self/mountinfo", mount("/", "cg", true));
  write("proc/self/cgroup", "0::/slice/job/step\n");
  v2("/slice", "5000", 4000);
  v2("/slice/job", "3000", 1500, 500);
  v2("/slice/job/step", "max", 100);
  EXPECT_EQ(shared(), (Left{{"MemAvailable", 7000 * 1024},
                            {"cg/slice/memory.max", 1000},
                            {"cg/slice/job/memory.max", 2000}}));
  v2("/slice/job/step", "100", 300);  // over it already
  EXPECT_EQ(shared().back(), std::pair(std::string("cg/slice/job/step/memory.max"), Index{0}));
}

TEST_F(Limits, V1CountsAllParentsAndKnowsItsWordForNone) {
  write("proc/self/mountinfo", mount("/", "mem", false));
  write("proc/self/cgroup", "5:cpu:/other\n4:memory,hugetlb:/a/b\n0::/x\n");
  v1("", "9223372036854771712", 100);
  v1("/a", "8000", 5000, 1000);
  v1("/a/b", "6000", 5000);
  EXPECT_EQ(shared(), (Left{{"MemAvailable", 7000 * 1024},
                            {"mem/a/memory.limit_in_bytes", 4000},
                            {"mem/a/b/memory.limit_in_bytes", 1000}}));
}

TEST_F(Limits, AContainerSeesItsPartOnly) {
  write("proc/self/mountinfo", mount("/docker/abc", "cg", true));
  write("proc/self/cgroup", "0::/docker/abc/inner\n");
  v2("", "4000", 1000);
  v2("/inner", "2000", 500);
  EXPECT_EQ(shared(), (Left{{"MemAvailable", 7000 * 1024},
                            {"cg/memory.max", 3000},
                            {"cg/inner/memory.max", 1500}}));
}

TEST_F(Limits, BrokenFilesBoundNothing) {
  write("proc/meminfo", "MemAvailable: much\n");
  write("proc/self/mountinfo", "nonsense\n\n" + mount("/", "cg", true));
  write("proc/self/cgroup", "0::/../x\nnonsense\n");
  write("cg/memory.max", "");
  write("cg/memory.current", "7\n");
  EXPECT_EQ(shared(), Left{});
}

TEST(Shm, IsToldOfByName) {
  EXPECT_FALSE(shm_note(1, 1, testing::TempDir()));
  EXPECT_FALSE(shm_note(1, 1, "/no/such/folder"));
  const auto note = shm_note(1 << 20, Index{1} << 40, testing::TempDir());
  ASSERT_TRUE(note);
  EXPECT_THAT(*note, testing::HasSubstr(testing::TempDir() + " has "));
}

TEST(Peak, IsOfWhatCameSince) {
  const Index before = begin_peak();
  if (before == 0) GTEST_SKIP() << "the system does not say";
  constexpr std::size_t kBytes = std::size_t{64} << 20;
  { std::vector<char> filled(kBytes, 1); }
  // The kernel counts pages some at a time.
  EXPECT_GE(peak_bytes() - before, static_cast<Index>(kBytes / 10 * 9));
}

}  // namespace
}  // namespace dattn
