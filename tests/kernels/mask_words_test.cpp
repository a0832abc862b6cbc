// What parse_mask refuses, and how it says so.
#include <gmock/gmock.h>

#include <stdexcept>

#include "kernels/check.hpp"
#include "kernels/mask.hpp"

namespace dattn {
namespace {

using testing::HasSubstr;

const Shape kShape{.queries = 10, .keys = 10, .query_heads = 4};

std::string refusal(const std::string& spec) {
  try {
    return "accepted as " + parse_mask(spec, kShape)->spec();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

std::string repeat(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

struct Refused {
  std::string spec;
  std::string because;
};

class BadWords : public testing::TestWithParam<Refused> {};

TEST_P(BadWords, AreRefusedInOneShortLine) {
  const std::string message = refusal(GetParam().spec);
  EXPECT_THAT(message, HasSubstr(GetParam().because));
  EXPECT_LT(message.size(), 200u);
  for (const char c : message) EXPECT_TRUE(' ' <= c && c <= '~') << static_cast<int>(c);
}

INSTANTIATE_TEST_SUITE_P(
    Table, BadWords,
    testing::Values(
        Refused{"", "no mask is called ''"},                                                  //
        Refused{"casual", "no mask is called 'casual'; there are full, causal, window, "},     //
        Refused{"Causal", "no mask is called 'Causal'"},                                      //
        Refused{" causal", "no mask is called ' causal'"},                                    //
        Refused{"causal\n[rank 0] fine", "'causal\\x0a[rank 0] fine'"},                       //
        Refused{"window:1,\x1b[31m", "'\\x1b[31m' is not a count"},                           //
        Refused{std::string("causal)\0\x7f\xff", 10), "')\\x00\\x7f\\xff'"},                  //
        Refused{repeat("x", 100000), "'" + repeat("x", 40) + "...'"},                         //
        Refused{"full:1", "'full' takes no argument"},                                        //
        Refused{"causal:1", "'causal' takes no argument"},                                    //
        Refused{"window", "'' is not a count; the mask is written window:L,R"},               //
        Refused{"window:3", "two sides"},                                                     //
        Refused{"window:3,", "'' is not a count"},                                            //
        Refused{"window:3,0,1", "two sides"},                                                 //
        Refused{"window:-1,0", "'-1' is not a count"},                                        //
        Refused{"window:+1,0", "nothing behind the ':' of 'window:'"},                        //
        Refused{"full:", "nothing behind the ':' of 'full:'"},                                //
        Refused{"window:1.5,0", "'1.5' is not a count"},                                      //
        Refused{"window:0x10,0", "'0x10' is not a count"},                                    //
        Refused{"window:1 ,0", "'1 ' is not a count"},                                        //
        Refused{"window:9223372036854775808,0", "is not a count"},                            //
        Refused{"window:1152921504606846977,0", "below 2^60"},                                //
        Refused{"documents", "'' is not a count"},                                            //
        Refused{"documents:4,5", "add up to 9, not 10 keys"},                                 //
        Refused{"documents:4,7", "add up to more than 10 keys"},                              //
        Refused{"documents:9223372036854775807,9223372036854775807", "more than 10 keys"},    //
        Refused{"documents:5,,5", "'' is not a count"},                                       //
        Refused{"prefix", "'' is not a count; the mask is written prefix:N"},                 //
        Refused{"prefix:1,2", "one length"},                                                  //
        Refused{"sink:1,2", "one count"},                                                     //
        Refused{"sink:-0x1", "'-0x1' is not a count"},                                        //
        Refused{"causal+", "no mask is called ''"},                                           //
        Refused{"/causal", "no mask is called ''"},                                           //
        Refused{"(causal", "a '(' is not closed"},                                            //
        Refused{"((causal)", "a '(' is not closed"},                                          //
        Refused{"causal)", "written mask@first-last"},                                        //
        Refused{"()", "no mask is called ''"},                                                //
        Refused{"causal(full)", "written mask@first-last"},                                   //
        Refused{repeat("(", 10000) + "causal" + repeat(")", 10000), "more than 64 parenth"},  //
        Refused{repeat("(", 65) + "causal" + repeat(")", 65), "more than 64 parenth"},        //
        Refused{"full" + repeat("+full", 100000), "more than 256 masks"},                     //
        Refused{"full" + repeat("/full", 256), "more than 256 masks"},                        //
        Refused{"causal@0-1", "heads 2-3 have no mask"},                                      //
        Refused{"causal@0-1;full@3", "heads 3-3 do not follow on"},                           //
        Refused{"causal@0-2;full@2-3", "heads 2-3 do not follow on"},                         //
        Refused{"causal@2-3;full@0-1", "heads 2-3 do not follow on"},                         //
        Refused{"causal@0-4", "a head number below 4"},                                       //
        Refused{"causal@0-3;full@4", "a head number below 4"},                                //
        Refused{"causal@3-0", "do not follow on"},                                            //
        Refused{"causal@2-1;full@2-3", "do not follow on"},                                   //
        Refused{"causal@-1-3", "a head number below 4"},                                      //
        Refused{"causal@", "a head number below 4"},                                          //
        Refused{"causal@0-", "a head number below 4"},                                        //
        Refused{"causal@99999999999999999999", "a head number below 4"},                      //
        Refused{"causal@0-3;", "no mask is called ''"},                                       //
        Refused{"causal;full", "written mask@first-last"},                                    //
        Refused{"causal@0-3x", "unexpected 'x'"},                                             //
        Refused{"causal@0-3@0-3", "unexpected '@0-3'"},                                       //
        Refused{"(causal@0-3)", "a '(' is not closed"}));

TEST(Words, AreTakenUpToTheirBounds) {
  EXPECT_EQ(refusal(repeat("(", 64) + "causal" + repeat(")", 64)), "accepted as causal");
  EXPECT_THAT(refusal("full" + repeat("/full", 255)), HasSubstr("accepted as full/full"));
  EXPECT_EQ(refusal("causal@0-1;full@2;sink:1@3"), "accepted as causal@0-1;full@2-2;sink:1@3-3");
}

TEST(Words, ParenthesesSideBySideAreNotNested) {
  EXPECT_THAT(refusal("(full)" + repeat("+(full)", 100)), HasSubstr("accepted as"));
}

TEST(Words, ATableIsNoPartOfAMask) {
  const MaskPtr causal = parse_mask("causal", kShape);
  const MaskPtr table = parse_mask("causal@0-1;full@2-3", kShape);
  EXPECT_DEATH(both(table, causal), "is_table");
  EXPECT_DEATH(either(causal, table), "is_table");
  EXPECT_DEATH(per_head({{Range{0, 4}, table}}), "is_table");
  EXPECT_DEATH(per_head({{Range{0, 2}, causal}, {Range{3, 4}, causal}}), "heads.begin == next");
}

TEST(Shown, IsOneShortPrintableLine) {
  EXPECT_EQ(shown("a b"), "'a b'");
  EXPECT_EQ(shown("\t\xc3\xa4"), "'\\x09\\xc3\\xa4'");
  EXPECT_EQ(shown(repeat("y", 41)), "'" + repeat("y", 40) + "...'");
}

}  // namespace
}  // namespace dattn
