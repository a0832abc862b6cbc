#include "launcher/values.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "launcher/failure.hpp"
#include "tests/launcher/complaint.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;
using std::string_literals::operator""s;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

po::options_description options() {
  po::options_description all("Problem");
  all.add_options()("help,h", "this text")("tokens", po::value<Count>()->default_value({4096}), "")(
      "heads", po::value<Positive>(), "")("block", po::value<AtLeast<16>>(), "")(
      "scale", po::value<Finite>()->default_value({0.125}), "")(
      "mesh", po::value<MeshSize>()->default_value({{2, 3}}), "")(
      "strategy", word({"ring", "ulysses", "tree"})->default_value("ring"), "")(
      "masks", words({"full", "causal", "window"}), "")("verbose,v", po::bool_switch(), "")(
      "label", po::value<std::string>(), "");
  return all;
}

po::variables_map run(const std::vector<std::string>& arguments) {
  return parse("dattn run", options(), arguments);
}

std::string wrong(const std::vector<std::string>& arguments) {
  return complaint(Exit::usage, [&] { run(arguments); });
}

TEST(Values, ReadsGoodOnes) {
  const auto values =
      run({"--tokens=8k", "--heads", "32", "--block", "16", "--scale", "-1e-3", "--mesh", "2x3x4",
           "--strategy", "tree", "--masks", "causal,full", "-v"});
  EXPECT_EQ(values["tokens"].as<Count>().value, 8192);
  EXPECT_EQ(values["heads"].as<Positive>().value, 32);
  EXPECT_EQ(values["block"].as<AtLeast<16>>().value, 16);
  EXPECT_EQ(values["scale"].as<Finite>().value, -1e-3);
  EXPECT_THAT(values["mesh"].as<MeshSize>().extents, ElementsAre(2, 3, 4));
  EXPECT_EQ(values["strategy"].as<std::string>(), "tree");
  EXPECT_THAT(values["masks"].as<std::vector<std::string>>(), ElementsAre("causal", "full"));
  EXPECT_TRUE(values["verbose"].as<bool>());
}

TEST(Values, Counts) {
  EXPECT_EQ(parse_count("0", 0), 0);
  EXPECT_EQ(parse_count("007", 0), 7);
  EXPECT_EQ(parse_count("1K", 0), 1024);
  EXPECT_EQ(parse_count("1m", 0), 1 << 20);
  EXPECT_EQ(parse_count("2G", 0), std::int64_t{2} << 30);
  EXPECT_EQ(parse_count("3t", 0), std::int64_t{3} << 40);
  EXPECT_EQ(parse_count("9223372036854775807", 0), std::numeric_limits<std::int64_t>::max());
}

TEST(Values, TakesALabelThatLooksLikeAnOptionAfterAnEqualSign) {
  EXPECT_EQ(run({"--label=--heads"})["label"].as<std::string>(), "--heads");
}

TEST(Values, Defaults) {
  const auto values = run({});
  EXPECT_EQ(values["tokens"].as<Count>().value, 4096);
  EXPECT_EQ(values["scale"].as<Finite>().value, 0.125);
  std::ostringstream help;
  help << options();
  EXPECT_THAT(help.str(), HasSubstr("(=4096)"));
  EXPECT_THAT(help.str(), HasSubstr("(=0.125)"));
  EXPECT_THAT(help.str(), HasSubstr("(=2x3)"));
}

TEST(Values, RefusesBadOnes) {
  const struct {
    std::string option, value, message;
  } table[] = {
      {"tokens", "-1", "'-1' is not a count (want 0, 1, 2, ... or 8K, 2M)"},
      {"tokens", "--heads", "its value is missing before '--heads'"},
      {"label", "--heads=3", "its value is missing before '--heads=3'"},
      {"tokens", "", "'' is not a count"},
      {"tokens", "K", "'K' is not a count"},
      {"tokens", "+4", "is not a count"},
      {"tokens", " 4", "is not a count"},
      {"tokens", "4 ", "is not a count"},
      {"tokens", "1e3", "is not a count"},
      {"tokens", "4.5", "is not a count"},
      {"tokens", "0x10", "is not a count"},
      {"tokens", "8KB", "is not a count"},
      {"tokens", "8KK", "is not a count"},
      {"tokens", "4,096", "is not a count"},
      {"tokens", "nan", "is not a count"},
      {"tokens", "4\r\n", "'4\\r\\n' is not a count"},
      {"tokens",
       "\xef\xbb\xbf"
       "4",
       "is not a count"},
      {"tokens", "9223372036854775808", "is too large"},
      {"tokens", "9007199254740992K", "is too large"},
      {"tokens", "8388608T", "is not a count"},
      {"tokens", std::string(65536, '1'), "1111...1111"},
      {"heads", "0", "'0' is too small (want 1, 2, 3, ... or 8K, 2M)"},
      {"block", "15", "'15' is too small (want 16 or more, or 8K, 2M)"},
      {"scale", "nan", "'nan' is not a finite number"},
      {"scale", "inf", "is not a finite number"},
      {"scale", "-infinity", "is not a finite number"},
      {"scale", "1e999", "is too large or too close to 0"},
      {"scale", "1e-999", "is too large or too close to 0"},
      {"scale", "0,5", "is not a finite number"},
      {"scale", "1.5x", "is not a finite number"},
      {"scale", " 1", "is not a finite number"},
      {"scale", "", "is not a finite number"},
      {"mesh", "", "is not a mesh (want 4 or 2x3"},
      {"mesh", "x", "is not a mesh"},
      {"mesh", "2x", "is not a mesh"},
      {"mesh", "2x0", "is not a mesh"},
      {"mesh", "2x-3", "is not a mesh"},
      {"mesh", "2X3", "is not a mesh"},
      {"mesh", "2*3", "is not a mesh"},
      {"mesh", "99999999999999999999x1", "is not a mesh"},
      {"mesh", "2147483648", "is too large a mesh"},
      {"mesh", "65536x65536", "is too large a mesh"},
      {"mesh", "1x1x1x1x1x1x1x1x1", "more than 8 extents"},
      {"strategy", "rign", "'rign' is not known, did you mean ring? (want one of: ring, ulysses"},
      {"strategy", "flash", "'flash' is not known (want one of: ring, ulysses, tree)"},
      {"strategy", "", "'' is not known"},
      {"strategy", "Ring", "did you mean ring?"},
      {"strategy", "ring\n", "'ring\\n' is not known"},
      {"masks", "full,full", "'full' is in the list twice"},
      {"masks", "full,", "'' is not known"},
      {"masks", ",", "'' is not known"},
      {"masks", "full, causal", "' causal' is not known"},
  };
  for (const auto& bad : table) {
    const std::string line = wrong({"--" + bad.option, bad.value});
    EXPECT_THAT(line, StartsWith("--" + bad.option + ": "));
    EXPECT_THAT(line, HasSubstr(bad.message));
    EXPECT_LT(line.size(), 200U);
  }
}

TEST(Parse, RefusesBadCommandLines) {
  const struct {
    std::vector<std::string> arguments;
    std::string message;
  } table[] = {
      {{"--foo"}, "unknown option '--foo' (see dattn run --help)"},
      {{"--foo=3"}, "unknown option '--foo' (see"},
      {{"--tokns", "3"}, "unknown option '--tokns' (did you mean --tokens? see dattn run --help)"},
      {{"--tok", "3"}, "unknown option '--tok'"},
      {{"--TOKENS", "3"}, "unknown option '--TOKENS'"},
      {{"-x"}, "unknown option '-x'"},
      {{"-tokens", "3"}, "unknown option '-t"},
      {{"--f\n\x1b[31mred"}, "unknown option '--f\\n\\x1b[31mred'"},
      {{"--" + std::string(65536, 'a')}, "aaa...aaa"},
      {{"--=3"}, "(see dattn run --help)"},
      {{"---"}, "(see dattn run --help)"},
      {{"extra"}, "unexpected argument 'extra' (see dattn run --help)"},
      {{"--heads", "4", "extra"}, "unexpected argument 'extra'"},
      {{"--", "--heads"}, "unexpected argument '--heads'"},
      {{""}, "unexpected argument ''"},
      {{"-"}, "unexpected argument '-'"},
      {{"--tokens"}, "--tokens: its value is missing (see dattn run --help)"},
      {{"--tokens="}, "--tokens: its value is missing"},
      {{"--verbose=1"}, "--verbose: takes no value"},
      {{"--tokens", "1", "--tokens", "2"}, "--tokens: given twice (leave one of them out)"},
      {{"-v", "--verbose"}, "--verbose: given twice"},
      {{"--label", "a", "--label", "b"}, "--label: given twice"},
  };
  for (const auto& bad : table) {
    const std::string line = wrong(bad.arguments);
    EXPECT_THAT(line, HasSubstr(bad.message));
    EXPECT_LT(line.size(), 200U);
  }
}

TEST(Parse, RequiredOptionsGiveWayToHelp) {
  po::options_description all;
  Count tokens{7};
  all.add_options()("help", "")("tokens", po::value<Count>(&tokens)->required(), "");
  const auto try_it = [&](std::vector<std::string> arguments) {
    return complaint(Exit::usage, [&] { parse("dattn plan", all, arguments); });
  };
  EXPECT_EQ(try_it({}), "--tokens: is required (see dattn plan --help)");
  EXPECT_EQ(try_it({"--help"}), "no complaint");
  EXPECT_EQ(tokens.value, 7);
  EXPECT_EQ(try_it({"--tokens", "9"}), "no complaint");
  EXPECT_EQ(tokens.value, 9);
}

TEST(Parse, AnythingIsAnAnswerOrOneLine) {
  const std::vector<std::string> pieces = {"-",          "--",    "=",    "tokens",
                                           "heads",      "v",     "help", "\n",
                                           "\0"s,        "%",     "K",    "1",
                                           "x",          "masks", "ring", ",",
                                           " ",          "\xff",  "h",    "%canonical_option%",
                                           "--strategy", "--mesh"};
  std::mt19937 random(1);
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::string> arguments(random() % 4);
    for (std::string& argument : arguments) {
      for (std::size_t i = random() % 5; i > 0; --i) argument += pieces[random() % pieces.size()];
    }
    const std::string line = wrong(arguments);  // Itself fails for any other kind of exception.
    ASSERT_LT(line.size(), 400U);
  }
}

TEST(Quoted, StaysInOneShortLine) {
  EXPECT_EQ(in_quotes("plain"), "'plain'");
  EXPECT_EQ(in_quotes("a\nb\rc\td\x01\x7f"), "'a\\nb\\rc\\td\\x01\\x7f'");
  EXPECT_EQ(in_quotes("gr\xc3\xb6\xc3\x9f"
                      "e \xe2\x82\xac \xf0\x9f\x98\x80"),
            "'gr\xc3\xb6\xc3\x9f"
            "e \xe2\x82\xac \xf0\x9f\x98\x80'");
  // A stray byte, a C1 control, a line separator, an overlong slash, a surrogate, a cut character.
  EXPECT_EQ(in_quotes("\xff"), "'\\xff'");
  EXPECT_EQ(in_quotes("\xc2\x85"), "'\\xc2\\x85'");
  EXPECT_EQ(in_quotes("\xe2\x80\xa8"), "'\\xe2\\x80\\xa8'");
  EXPECT_EQ(in_quotes("\xc0\xaf"), "'\\xc0\\xaf'");
  EXPECT_EQ(in_quotes("\xed\xa0\x80"), "'\\xed\\xa0\\x80'");
  EXPECT_EQ(in_quotes("\xe2\x82"), "'\\xe2\\x82'");
  EXPECT_EQ(in_quotes("0123456789", 4), "'01...89'");
  EXPECT_EQ(in_quotes("a\xc3\xb6\xc3\xb6\xc3\xb6"
                      "b",
                      4),
            "'a...b'");
  EXPECT_LT(in_quotes(std::string(65536, 'x')).size(), 70U);
}

TEST(FailureTest, EscapesLineBreaks) {
  EXPECT_STREQ(Failure(Exit::internal, "two\nlines").what(), "two\\nlines");
}

}  // namespace
}  // namespace dattn
