#include "launcher/output_file.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "launcher/failure.hpp"
#include "tests/launcher/complaint.hpp"

namespace dattn {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

std::span<const std::byte> bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

std::string contents(const std::string& path) {
  std::ostringstream all;
  all << std::ifstream(path, std::ios::binary).rdbuf();
  return all.str();
}

class OutputTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "dattn_out_XXXXXX";
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = fs::canonical(pattern).string();
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }

  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(path(name)) << text;
    return path(name);
  }

  std::size_t files() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }

  std::string folder_;
};

TEST_F(OutputTest, ManyWritersMakeOneFile) {
  {
    OutputFile root = OutputFile::create(path("o"), 10, "job1", "head");
    OutputFile other = OutputFile::join(path("o"), "job1");
    EXPECT_EQ(root.temporary(), path("o.tmp.job1"));
    other.write_at(7, bytes("XYZ"));
    root.write_at(4, bytes("abc"));
    other.sync();
    root.sync();
    EXPECT_FALSE(fs::exists(path("o")));
    root.commit();
  }
  EXPECT_EQ(contents(path("o")), "headabcXYZ");
  EXPECT_EQ(files(), 1U);
}

TEST_F(OutputTest, WithoutCommitNothingChanges) {
  write("o", "old");
  {
    const OutputFile root = OutputFile::create(path("o"), 3, "job1", "new");
    { const OutputFile other = OutputFile::join(path("o"), "job1"); }
    EXPECT_TRUE(fs::exists(root.temporary())) << "only the creator removes it";
  }
  EXPECT_EQ(contents(path("o")), "old");
  EXPECT_EQ(files(), 1U);
}

TEST_F(OutputTest, CommitReplacesTheOldFile) {
  write("o", "something longer");
  OutputFile::create(path("o"), 3, "job1", "new").commit();
  EXPECT_EQ(contents(path("o")), "new");
}

TEST_F(OutputTest, AnEmptyFileIsAFile) {
  OutputFile::create(path("o"), 0, "job1").commit();
  EXPECT_EQ(contents(path("o")), "");
}

TEST_F(OutputTest, ALinkStaysALink) {
  write("o", "old");
  ASSERT_EQ(::symlink("o", path("link").c_str()), 0);
  OutputFile::create(path("link"), 3, "job1", "new").commit();
  EXPECT_TRUE(fs::is_symlink(path("link")));
  EXPECT_EQ(contents(path("o")), "new");
}

TEST_F(OutputTest, TakesAPathRelativeToTheFolder) {
  const fs::path before = fs::current_path();
  fs::current_path(folder_);
  OutputFile::create("o", 3, "job1", "new").commit();
  fs::current_path(before);
  EXPECT_EQ(contents(path("o")), "new");
}

TEST_F(OutputTest, MovingKeepsOneOwner) {
  OutputFile first = OutputFile::create(path("a"), 1, "job1", "a");
  OutputFile second(std::move(first));
  EXPECT_EQ(files(), 1U);
  first = OutputFile::create(path("b"), 1, "job1", "b");
  first = std::move(second);
  first.commit();
  EXPECT_EQ(contents(path("a")), "a");
}

TEST_F(OutputTest, RefusesPlacesThatCannotBeWritten) {
  ASSERT_EQ(::mkfifo(path("fifo").c_str(), 0600), 0);
  ASSERT_EQ(::symlink("loop", path("loop").c_str()), 0);
  write("file", "");
  const struct {
    std::string path, message;
  } table[] = {
      {"", "is no file name"},
      {folder_, "is a directory"},
      {folder_ + "/", "is a directory"},
      {path("new/"), "is a directory name"},
      {path("missing/o"), "its directory does not exist; fix: create it with mkdir -p"},
      {path("file/o"), "Not a directory"},
      {path("fifo"), "is a pipe or device"},
      {"/dev/null", "is a pipe or device"},
      {path("loop"), "symbolic links"},
      {path(std::string(250, 'n')), "File name too long"},
      {path(std::string(5000, '\n')), "File name too long"},
  };
  const std::size_t before = files();
  for (const auto& bad : table) {
    const std::string line =
        complaint(Exit::output, [&] { OutputFile::create(bad.path, 1, "job1", "x"); });
    EXPECT_THAT(line, HasSubstr(bad.message));
    EXPECT_THAT(line, HasSubstr("; fix: "));
    EXPECT_EQ(complaint(Exit::output, [&] { write_text_file(bad.path, "x"); }).substr(0, 3),
              line.substr(0, 3));
  }
  EXPECT_EQ(files(), before);
}

TEST_F(OutputTest, RefusesWhatPermissionsForbid) {
  // Root may write everywhere, so the test becomes somebody else for its duration.
  const bool root = ::geteuid() == 0;
  fs::create_directory(path("closed"));
  write("readonly", "keep");
  ASSERT_EQ(::chmod(folder_.c_str(), 0777), 0);
  ASSERT_EQ(::chmod(path("closed").c_str(), 0555), 0);
  ASSERT_EQ(::chmod(path("readonly").c_str(), 0444), 0);
  if (root && ::seteuid(65534) != 0) GTEST_SKIP() << "root without the right to become nobody";
  const auto closed = complaint(Exit::output, [&] { refuse_unwritable(path("closed/o")); });
  const auto readonly = complaint(Exit::output, [&] { refuse_unwritable(path("readonly")); });
  const auto good = complaint(Exit::output, [&] { refuse_unwritable(path("o")); });
  if (root) {
    ASSERT_EQ(::seteuid(0), 0);
  }
  EXPECT_THAT(closed, HasSubstr("its directory cannot be written to: Permission denied"));
  EXPECT_THAT(readonly, HasSubstr("the existing file cannot be replaced: Permission denied"));
  EXPECT_EQ(good, "no complaint");
}

TEST_F(OutputTest, NoRoomIsSaidBeforeAnythingIsLeft) {
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  const std::string line =
      complaint(Exit::output, [&] { OutputFile::create(path("o"), most, "job1", "x"); });
  EXPECT_THAT(line, HasSubstr("no room for 9223372036854775807 bytes"));
  EXPECT_THAT(line, HasSubstr("fix: free space"));
  EXPECT_EQ(files(), 0U);

  rlimit old = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  const rlimit small = {100, old.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto limited = complaint(Exit::output, [&] { OutputFile::create(path("o"), 101, "job1"); });
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  EXPECT_THAT(limited, HasSubstr("File too large"));
  EXPECT_EQ(files(), 0U);
}

TEST_F(OutputTest, RefusesASecondCreatorAndAnEarlyJoin) {
  EXPECT_THAT(complaint(Exit::output, [&] { OutputFile::join(path("o"), "job1"); }),
              HasSubstr("No such file"));
  const OutputFile root = OutputFile::create(path("o"), 1, "job1");
  EXPECT_THAT(complaint(Exit::output, [&] { OutputFile::create(path("o"), 1, "job1"); }),
              HasSubstr("is there already"));
  EXPECT_TRUE(fs::exists(root.temporary())) << "the second one must not remove it";
}

TEST_F(OutputTest, BrokenPreconditionsAreBugs) {
  EXPECT_NE(complaint(Exit::internal, [&] { OutputFile::create(path("o"), 1, "a/b"); }), "");
  EXPECT_NE(complaint(Exit::internal, [&] { OutputFile::create(path("o"), 1, ""); }), "");
  EXPECT_NE(complaint(Exit::internal, [&] { OutputFile::create(path("o"), -1, "j"); }), "");
  EXPECT_THAT(complaint(Exit::internal, [&] { OutputFile::create(path("o"), 1, "j", "xy"); }),
              HasSubstr("header longer"));
  OutputFile root = OutputFile::create(path("o"), 4, "j");
  OutputFile other = OutputFile::join(path("o"), "j");
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t offset : {std::int64_t{-1}, std::int64_t{3}, std::int64_t{5}, most}) {
    EXPECT_THAT(complaint(Exit::internal, [&] { other.write_at(offset, bytes("xy")); }),
                HasSubstr("write beyond the end"));
  }
  EXPECT_THAT(complaint(Exit::internal, [&] { other.commit(); }), HasSubstr("commit"));
  root.commit();
  EXPECT_THAT(complaint(Exit::internal, [&] { root.commit(); }), HasSubstr("commit"));
}

TEST_F(OutputTest, AKilledProcessLeavesTheOldFile) {
  write("o", "old");
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const OutputFile root = OutputFile::create(path("o"), 6, "job1", "newnew");
    root.sync();
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(contents(path("o")), "old");
}

TEST_F(OutputTest, AnExpectedTemporaryGoesThoughItsMakerWasKilled) {
  expect_temporary(path("o"), "job1");
  expect_temporary(path("never"), "job1");
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const OutputFile root = OutputFile::create(path("o"), 6, "job1", "newnew");
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(files(), 1U);
  remove_temporaries();
  EXPECT_EQ(files(), 0U);
}

TEST_F(OutputTest, SameFileInEveryDisguise) {
  const std::string in = write("in", "");
  ASSERT_EQ(::symlink("in", path("link").c_str()), 0);
  ASSERT_EQ(::link(in.c_str(), path("hard").c_str()), 0);
  fs::create_directory(path("sub"));
  const auto check = [](const std::vector<std::string>& inputs,
                        const std::vector<std::string>& outputs) {
    return complaint(Exit::usage, [&] { refuse_same_file(inputs, outputs); });
  };
  for (const std::string name : {"in", "link", "hard", "sub/../in", "./in"}) {
    EXPECT_THAT(check({in}, {path(name)}), HasSubstr("is the same file as the input")) << name;
    EXPECT_THAT(check({}, {in, path(name)}), HasSubstr("is the same file as the output")) << name;
  }
  EXPECT_THAT(check({}, {path("new"), path("sub/../new")}),
              HasSubstr("the same file as the output"));
  EXPECT_THAT(check({}, {"-", "-"}), HasSubstr("'-' is the same file"));
  EXPECT_EQ(check({in, in, ""}, {path("new"), path("new2"), "", "", "-"}), "no complaint");
}

TEST_F(OutputTest, WritesTexts) {
  write_text_file(path("t"), "first");
  write_text_file(path("t"), "second\n");
  EXPECT_EQ(contents(path("t")), "second\n");
  EXPECT_EQ(files(), 1U);
  testing::internal::CaptureStdout();
  write_text_file("-", "to stdout\n");
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "to stdout\n");
}

}  // namespace
}  // namespace dattn
