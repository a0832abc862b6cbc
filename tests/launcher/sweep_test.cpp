// The combinations of a sweep, and the file that its rows go to.
#include "launcher/sweep.hpp"

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "launcher/failure.hpp"
#include "launcher/row_file.hpp"

namespace dattn {
namespace {

using Words = std::vector<std::string>;
using testing::ElementsAre;

const std::set<std::string> kLists{"tokens", "strategy"};
const std::set<std::string> kWhole{"mask"};

TEST(Sweep, TakesListsByCommasWordsAndRepeats) {
  const auto all = sweep({"--tokens", "4K,8K", "--check", "--mask", "causal", "window:512,0",
                          "--repeat", "3", "--strategy=ring", "--mask=full"},
                         kLists, kWhole);
  ASSERT_EQ(all.size(), 6U);
  EXPECT_EQ(all[0].arguments,
            (Words{"--check", "--repeat", "3", "--tokens=4K", "--mask=causal", "--strategy=ring"}));
  EXPECT_EQ(all[1].differs, "--tokens 4K --mask window:512,0");
  EXPECT_EQ(all[5].differs, "--tokens 8K --mask full");
}

TEST(Sweep, WithoutListsIsOneConfiguration) {
  const auto all = sweep({"--tokens", "4K", "stray"}, kLists, kWhole);
  ASSERT_EQ(all.size(), 2U);  // `stray` is a value that parse() will refuse
  EXPECT_EQ(sweep({}, kLists, kWhole).size(), 1U);
  EXPECT_EQ(sweep({"stray", "--tokens=1"}, kLists, kWhole)[0].arguments,
            (Words{"stray", "--tokens=1"}));
  EXPECT_THROW(sweep({"--tokens"}, kLists, kWhole), Failure);
  EXPECT_THROW(sweep({"--tokens", "--mask", "full"}, kLists, kWhole), Failure);
}

TEST(Sweep, RefusesTooManyAtOnce) {
  std::string list = "1";
  for (int i = 2; i < 400; ++i) list += "," + std::to_string(i);
  EXPECT_THROW(sweep({"--tokens", list, "--strategy", list}, kLists, kWhole), Failure);
}

class Rows : public testing::Test {
 protected:
  Rows()
      : path_(std::filesystem::path(testing::TempDir()) / ("rows" + std::to_string(::getpid()))) {}
  ~Rows() override { std::filesystem::remove(path_); }

  void write(const std::string& text) const { std::ofstream(path_) << text; }
  std::string content() const {
    std::ostringstream text;
    text << std::ifstream(path_).rdbuf();
    return text.str();
  }
  static nlohmann::ordered_json row(const std::string& key) { return {{"bench", 1}, {"key", key}}; }
  static std::string line(const std::string& key) { return row(key).dump() + "\n"; }

  std::filesystem::path path_;
};

TEST_F(Rows, AreThereAfterwards) {
  {
    RowFile file(path_);
    EXPECT_TRUE(file.keys().empty());
    file.add(row("a"));
    file.add(row("b"));
  }
  EXPECT_EQ(content(), line("a") + line("b"));
  EXPECT_THAT(RowFile(path_).keys(), ElementsAre("a", "b"));
}

TEST_F(Rows, ATornLineIsCutWhereverItTears) {
  for (std::size_t torn = 0; torn < line("b").size(); ++torn) {
    write(line("a") + line("b").substr(0, torn));
    EXPECT_THAT(RowFile(path_).keys(), ElementsAre("a")) << torn;
    EXPECT_EQ(content(), line("a")) << torn;
    write(line("b").substr(0, torn));
    EXPECT_TRUE(RowFile(path_).keys().empty()) << torn;
    EXPECT_EQ(content(), "") << torn;
  }
  write(line("a") + R"({"bench":1,"key":"b)" + "\n");  // torn, and a line break behind it
  EXPECT_THAT(RowFile(path_).keys(), ElementsAre("a"));
}

TEST_F(Rows, OfOthersStayAsTheyAre) {
  for (const std::string& text :
       {std::string("my notes"), std::string("my notes\n"), "{}\n" + line("a"), line("a") + "x",
        line("a") + "\n" + line("b"), line("a") + R"({"key":"b"})" + "\n",
        R"({"bench":1,"ke)"
        "\n" +
            line("a"),
        std::string(R"({"bench":1,"key":3})"
                    "\n"
                    "y\n")}) {
    write(text);
    try {
      RowFile file(path_);
      ADD_FAILURE() << text;
    } catch (const Failure& e) {
      EXPECT_EQ(e.code, Exit::input) << text;
    }
    EXPECT_EQ(content(), text);
  }
}

TEST_F(Rows, LastWordsComeOnce) {
  EXPECT_FALSE(RowFile::add_last(path_, 0, row("a")));  // there is no file to add to
  RowFile file(path_);
  file.add(row("a"));
  EXPECT_TRUE(RowFile::add_last(path_, file.begin(), row("b")));
  EXPECT_TRUE(RowFile::add_last(path_, file.begin(), row("b")));
  EXPECT_TRUE(RowFile::add_last(path_, file.begin(), row("a")));
  EXPECT_EQ(content(), line("a") + line("b"));
}

TEST_F(Rows, LastWordsComeOnceMoreInAnotherSweep) {
  write(line("a") + line("b"));
  const RowFile file(path_);
  EXPECT_TRUE(RowFile::add_last(path_, file.begin(), row("a")));
  EXPECT_TRUE(RowFile::add_last(path_, file.begin(), row("a")));
  EXPECT_EQ(content(), line("a") + line("b") + line("a"));
}

}  // namespace
}  // namespace dattn
