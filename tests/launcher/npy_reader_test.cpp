#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "launcher/failure.hpp"
#include "launcher/npy.hpp"
#include "tests/launcher/complaint.hpp"

namespace dattn {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Type = NpyHeader::Type;

class NpyFile : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "dattn_npy_XXXXXX";
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }

  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path(name), std::ios::binary) << bytes;
    return path(name);
  }

  template <class T>
  std::string write_array(const std::string& name, Type type,
                          const std::vector<std::int64_t>& shape,
                          const std::vector<T>& values) const {
    const auto data = std::as_bytes(std::span(values));
    return write(name, npy_header(type, shape) +
                           std::string(reinterpret_cast<const char*>(data.data()), data.size()));
  }

  std::string folder_;
};

TEST_F(NpyFile, RefusesWhatIsNotARegularFile) {
  ASSERT_EQ(::mkfifo(path("fifo").c_str(), 0600), 0);
  ASSERT_EQ(::symlink(path("loop").c_str(), path("loop").c_str()), 0);
  write("empty", "");
  const struct {
    std::string file, message;
  } table[] = {
      {path("missing.npy"), "No such file"},
      {folder_, "is a directory"},
      {path("fifo"), "is a pipe or device"},
      {"/dev/zero", "is a pipe or device"},
      {"/dev/null", "is a pipe or device"},
      {path("loop"), "symbolic links"},
      {path("empty"), "is empty"},
      {path("empty") + "/x", "Not a directory"},
      {"", "cannot be opened"},
      {path(std::string(5000, 'n') + "\n"), "File name too long"},
  };
  for (const auto& bad : table) {
    const std::string line = complaint(Exit::input, [&] { NpyReader reader(bad.file); });
    EXPECT_THAT(line, HasSubstr(bad.message));
    EXPECT_THAT(line, HasSubstr("; fix: "));
  }
}

TEST_F(NpyFile, FollowsASymbolicLink) {
  const std::string file = write_array<float>("f4.npy", Type::f4, {2}, {1, 2});
  ASSERT_EQ(::symlink(file.c_str(), path("link").c_str()), 0);
  EXPECT_EQ(NpyReader(path("link")).rows(), 2);
}

template <class T>
std::vector<T> read(const NpyReader& reader, std::int64_t first, std::int64_t count,
                    std::int64_t step) {
  std::vector<T> out(static_cast<std::size_t>(count * reader.row_size() + 1), T{-7});
  reader.read_rows(first, count, step, out.data());
  EXPECT_EQ(out.back(), T{-7}) << "wrote beyond its rows";
  out.pop_back();
  return out;
}

/// Element i holds i, so each expected element is its own index.
template <class T>
void expect_rows(const NpyReader& reader, std::int64_t first, std::int64_t count,
                 std::int64_t step) {
  const std::vector<T> got = read<T>(reader, first, count, step);
  const std::int64_t size = reader.row_size();
  for (std::int64_t i = 0; i < std::ssize(got); ++i) {
    ASSERT_EQ(got[static_cast<std::size_t>(i)],
              static_cast<T>((first + i / size * step) * size + i % size))
        << "first " << first << " count " << count << " step " << step << " at " << i;
  }
}

template <class T>
std::vector<T> counting(std::int64_t count) {
  std::vector<T> values;
  for (std::int64_t i = 0; i < count; ++i) values.push_back(static_cast<T>(i));
  return values;
}

TEST_F(NpyFile, ReadsRowsOfEveryStep) {
  for (const std::int64_t row : {1, 3, 1500}) {
    const NpyReader single(write_array("f4.npy", Type::f4, {40, row}, counting<float>(40 * row)));
    const NpyReader twice(write_array("f8.npy", Type::f8, {40, row}, counting<double>(40 * row)));
    for (const std::int64_t step : {1, 2, 3, 16, 17, 39}) {
      for (const std::int64_t first : {0, 5, 39}) {
        for (std::int64_t count = 0; count <= (39 - first) / step + 1; ++count) {
          expect_rows<float>(single, first, count, step);
          expect_rows<double>(single, first, count, step);
          expect_rows<float>(twice, first, count, step);
          expect_rows<double>(twice, first, count, step);
        }
      }
    }
  }
}

TEST_F(NpyFile, ReadsMoreThanOneBuffer) {
  const std::int64_t rows = 1'300'003;  // Two 4 MiB buffers and a rest, for each step.
  const NpyReader reader(write_array("f8.npy", Type::f8, {rows}, counting<double>(rows)));
  for (const std::int64_t step : {1, 2, 16}) {
    expect_rows<float>(reader, 1, (rows - 2) / step + 1, step);
    expect_rows<double>(reader, 1, (rows - 2) / step + 1, step);
  }
}

TEST_F(NpyFile, ReadsHalves) {
  const NpyReader reader(write_array<std::uint16_t>("f2.npy", Type::f2, {3, 2},
                                                    {0, 1, 0x3c00, 0xc000, 0x7bff, 0x7c00}));
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_THAT(read<float>(reader, 0, 3, 1), ElementsAre(0, 0x1p-24F, 1, -2, 65504, infinity));
  EXPECT_THAT(read<double>(reader, 0, 2, 2), ElementsAre(0, 0x1p-24, 65504, infinity));
}

TEST_F(NpyFile, RowsOfNothing) {
  const NpyReader reader(write_array<float>("f4.npy", Type::f4, {3, 0, 2}, {}));
  EXPECT_EQ(reader.row_size(), 0);
  EXPECT_TRUE(read<float>(reader, 0, 3, 1).empty());
  EXPECT_TRUE(
      read<float>(NpyReader(write_array<float>("f4.npy", Type::f4, {0, 2}, {})), 0, 0, 1).empty());
}

TEST_F(NpyFile, RowsOutsideAreABug) {
  const NpyReader reader(write_array("f4.npy", Type::f4, {4}, counting<float>(4)));
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  const std::int64_t table[][3] = {{-1, 1, 1}, {0, -1, 1},   {0, 1, 0},    {4, 1, 1},   {0, 5, 1},
                                   {0, 3, 2},  {3, 2, most}, {most, 1, 1}, {0, most, 1}};
  float out[8] = {};
  for (const auto& [first, count, step] : table) {
    try {
      reader.read_rows(first, count, step, out);
      ADD_FAILURE() << first << " " << count << " " << step;
    } catch (const Failure& failure) {
      EXPECT_EQ(failure.code, Exit::internal);
    }
  }
}

TEST_F(NpyFile, AFileThatShrinksIsAnError) {
  const std::string file = write_array("f4.npy", Type::f4, {40, 10}, counting<float>(400));
  const NpyReader reader(file);
  ASSERT_EQ(::truncate(file.c_str(), 200), 0);
  for (const std::int64_t step : {1, 2, 20}) {
    EXPECT_THAT(complaint(Exit::input, [&] { read<float>(reader, 10, 2, step); }),
                HasSubstr("changed while reading"));
    EXPECT_THAT(complaint(Exit::input, [&] { read<double>(reader, 10, 2, step); }),
                HasSubstr("changed while reading"));
  }
}

TEST_F(NpyFile, MovesItsFile) {
  NpyReader first(write_array("f4.npy", Type::f4, {2}, counting<float>(2)));
  NpyReader second(std::move(first));
  expect_rows<float>(second, 0, 2, 1);
  NpyReader third(write_array("other.npy", Type::f4, {3}, counting<float>(3)));
  third = std::move(second);
  expect_rows<float>(third, 0, 2, 1);
}

}  // namespace
}  // namespace dattn
