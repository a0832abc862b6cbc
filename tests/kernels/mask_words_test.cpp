// What parse_mask refuses, and how it says so.
#include <gmock/gmock.h>

#include <limits>
#include <stdexcept>

#include "kernels/check.hpp"
#include "kernels/mask.hpp"
#include "kernels/masks/blocks.hpp"
#include "tests/block_files.hpp"

namespace dattn {
namespace {

using testing::HasSubstr;

const Shape kShape{.queries = 10, .keys = 10, .query_heads = 4};

std::string refusal(const std::string& spec) {
  try {
    return "accepted as " + parse_mask(spec, kShape, open_blocks)->spec();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

std::string repeat(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

TEST(MaskWords, CountsMayHaveSuffixes) {
  const Shape shape{.queries = 1 << 16, .keys = 1 << 16, .query_heads = 4};
  for (const auto& [with, without] : std::vector<std::pair<std::string, std::string>>{
           {"window:4K,1k", "window:4096,1024"},
           {"window:2M,0", "window:2097152,0"},
           {"window:1G,1T", "window:1073741824,1099511627776"},
           {"documents:32K,32K", "documents:32768,32768"},
           {"prefix:8K", "prefix:8192"},
           {"stream:sink=1K,recent=2K", "stream:sink=1024,recent=2048"},
           {"neighbor:dims=1Kx64,window=1x7", "neighbor:dims=1024x64,window=1x7"}}) {
    EXPECT_EQ(parse_mask(with, shape)->spec(), parse_mask(without, shape)->spec()) << with;
  }
}

TEST(MaskWords, DocumentsMayBeginWhereAFileSays) {
  const Shape shape{.queries = 10, .keys = 10};
  EXPECT_EQ(parse_mask("documents:offsets=\"offsets 0 3 3 4 10\"", shape, open_blocks)->spec(),
            parse_mask("documents:3,0,1,6", shape)->spec());
  EXPECT_THROW(parse_mask("documents:offsets=none", shape), std::invalid_argument);
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
    testing::ValuesIn(std::vector<Refused>{
        Refused{"", "no mask is called ''"},                                                  //
        Refused{"casual", "no mask is called 'casual'; there are full, causal, window, "},    //
        Refused{"Causal", "no mask is called 'Causal'"},                                      //
        Refused{" causal", "no mask is called ' causal'"},                                    //
        Refused{"causal\n[rank 0] fine", "'causal\\x0a[rank 0] fine'"},                       //
        Refused{"window:1,\x1b[31m", "'\\x1b[31m' is not a count"},                           //
        Refused{std::string("causal)\0\x7f\xff", 10), "')\\x00\\x7f\\xff'"},                  //
        Refused{repeat("x", 100000), "'" + repeat("x", 40) + "...'"},                         //
        Refused{"full:1", "'full' takes no argument"},                                        //
        Refused{"causal:1", "'causal' takes no argument"},                                    //
        Refused{"window:K,0", "'K' is not a count"},                                          //
        Refused{"window:1Ki,0", "'1Ki' is not a count"},                                      //
        Refused{"window:8388608T,0", "'8388608T' is not a count"},                            //
        Refused{"stream:sink=2T", "sink has '2T' where it takes a count from 0 to 2^40"},     //
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
        Refused{"documents:offsets=\"offsets 0 4 8\"", "ends with 8"},                        //
        Refused{"documents:offsets=\"offsets 1 10\"", "begins with 1"},                       //
        Refused{"documents:offsets=\"offsets 0 6 4 10\"", "has 4 behind 6"},                  //
        Refused{"documents:offsets=\"offsets \"", "holds no list"},                           //
        Refused{"documents:offset=5", "offset"},                                              //
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
        Refused{"(causal@0-3)", "a '(' is not closed"},                                       //
        Refused{"blocks", "size takes one or two counts"},                                    //
        Refused{"blocks:size=2", "rows and columns a file each"},                             //
        Refused{"blocks:size=0,rows=a,columns=b", "'0' where it takes a count"},              //
        Refused{"blocks:size=1x2x3,rows=a,columns=b", "one or two counts"},                   //
        Refused{"blocks:rows=a,columns=b", "one or two counts"},                              //
        Refused{"blocks:size=2,rows=\"\",columns=b", "a file each"},                          //
        Refused{"blocks:size=2,rows=a/b,columns=c", "stands in double quotes"},               //
        Refused{"blocks:size=2,rows=\"a,columns=c", "ends in no quote"},                      //
        Refused{"blocks:size=2,rows=\"a\"b,columns=c", "ends in no quote"},                   //
        Refused{"blocks:size=2,rows=\"a\"b\",columns=c", "ends in no quote"},                 //
        Refused{"blocks:size=2,rows=a\"\"b,columns=c", "written twice, and the name in"},     //
        Refused{"blocks:size=2,rows=\"a\"/\"b\",columns=c", "stands in double quotes"},       //
        Refused{"\"causal\"", "no mask is called '\"causal\"'"},                              //
        Refused{"blocks:size=4,rows=\"rows 3x3x3\",columns=b", "'rows 3x3x3' holds 3x4"},     //
        Refused{"blocks:size=4,rows=\"rows 1x2x3\",columns=b", "take 4 for all heads"},       //
        Refused{"blocks:size=4,rows=\"rows 1x3x3\",columns=\"columns 2x3x3\"",
                "but the offsets in rows='rows 1x3x3' end at "},
        Refused{"batch", "sequences takes a count from 1 to 2^20"},                           //
        Refused{"batch:sequences=1048577", "sequences takes a count from 1 to 2^20"},         //
        Refused{"batch:sequences=10,levels=1x3", "10 queries and 13 keys (sequences * new"},  //
        Refused{"batch:sequences=5,new=2,suffix=3", "10 queries and 15 keys"},                //
        Refused{"batch:sequences=5,new=2,suffix=1", "suffix has '1' where it takes a count from 2"},
        Refused{"batch:sequences=5,new=2,suffix=2:3", "suffix has 2 lengths for 5 sequences"},
        Refused{"batch:sequences=2,suffix=2x3", "suffix takes one length, or one for each"},
        Refused{"batch:sequences=2,suffix=5,longest=4", "longest has '4' where it takes a count"},
        Refused{"batch:sequences=2,suffix=2:3,longest=4", "longest goes with one length"},
        Refused{"batch:sequences=5,new=2,levels=6x1", "level 6x1 has more groups than the 5 seq"},
        Refused{"batch:sequences=5,levels=2", "level 2 is not the number of groups and the length"},
        Refused{"batch:sequences=5,levels=3x1x2", "level 3x1x2 is not the number of groups"},
        Refused{"batch:sequences=5,levels=1x0", "levels has '0' where it takes a count from 1"},
        Refused{"batch:sequences=5,levels=1x1:", "levels has '' where it takes a count"},
        Refused{"batch:sequences=6,levels=2x1:3x1", "level 3x1 has a group on both sides of seq"},
        Refused{"batch:sequences=6,levels=2x1:4x1,sizes=3x3:1x1x2x2", "both sides of sequence 3"},
        Refused{"batch:sequences=6,levels=2x1,sizes=2x3", "sizes 2x3 are 5 sequences, not 6"},
        Refused{"batch:sequences=6,levels=2x1,sizes=6", "sizes 6 are not those of 2 groups"},
        Refused{"batch:sequences=6,sizes=6", "as many lists as there are levels, 0"},
        Refused{"batch:sequences=6,levels=1x1,sizes=6:6", "as many lists as there are levels, 1"},
        Refused{"batch:sequences=6,longer=7", "nothing is called 'longer'"},
        Refused{"batch:sequences=1048576,suffix=1099511627776,levels=1x1", "pass 2^60"},
        Refused{"batch:sequences=1" + repeat(",levels=1x1", 2), "'levels' is set twice"},
        Refused{"batch:sequences=1,levels=1x1" + repeat(":1x1", 16), "at most 16 levels"}}));

std::string complaint_of(const BlockLists& lists) {
  const Shape shape{.queries = 3, .keys = 5, .query_heads = 4, .key_heads = 2, .value_heads = 2};
  try {
    return "accepted as " + blocks_mask(lists, shape)->spec();
  } catch (const BadMaskNumbers& error) {
    return error.what();
  }
}

TEST(BlockArrays, AreRefusedWithListAndBlock) {
  // Blocks of 2: three of queries, three of keys.
  const auto lists = [](std::vector<Index> rows, std::vector<Index> columns) {
    return BlockLists{2, 2, std::move(rows), std::move(columns)};
  };
  EXPECT_THAT(complaint_of(lists({0, 1, 1, 3}, {2, 0, 1})),
              HasSubstr("accepted as blocks:size=2x2"));
  EXPECT_THAT(complaint_of(lists({0, 1, 1}, {2})), HasSubstr("rows holds 3 offsets; 5 keys"));
  EXPECT_THAT(complaint_of(lists({}, {})), HasSubstr("rows holds 0x4 offsets"));
  EXPECT_THAT(complaint_of(lists({1, 1, 1, 1}, {2})), HasSubstr("of list 0 begin with 1"));
  EXPECT_THAT(complaint_of(lists({0, 1, 1, 1, 1, 1, 1, 2}, {2, 2})),
              HasSubstr("of list 1 begin with 1; each list's own begin with 0"));
  EXPECT_THAT(complaint_of(lists({0, 2, 1, 3}, {2, 2, 2})),
              HasSubstr("fall from 2 to 1 at query block 1"));
  EXPECT_THAT(complaint_of(lists({0, 1, 2, 3}, {2, 2})),
              HasSubstr("columns holds 2 blocks, but the offsets in rows end at 3"));
  EXPECT_THAT(complaint_of(lists({0, 1, 1, 1}, {3})),
              HasSubstr("block 3 of query block 0 of list 0 is none of the 3 key blocks"));
  EXPECT_THAT(complaint_of(lists({0, 1, 1, 1}, {-1})), HasSubstr("block -1 of"));
  EXPECT_THAT(complaint_of(lists({0, 0, 0, 2}, {1, 1})),
              HasSubstr("block 1 of query block 2 of list 0 comes behind block 1"));
  const Index most = std::numeric_limits<Index>::max();
  EXPECT_THAT(complaint_of(lists({0, 0, 0, most, 0, 0, 0, most}, {})), HasSubstr("more than 2^63"));
}

TEST(Words, NameFilesInQuotes) {
  const std::string words = "causal+" + block_words(4, 4, 4, 10) + "/(sink:1)";
  EXPECT_EQ(refusal(words), "accepted as " + words.substr(0, words.size() - 8) + "sink:1");
  std::string asked;
  const OpenNumbers open = [&](const std::string& file) -> NumberFile {
    asked = file;
    throw BadMaskNumbers("enough");
  };
  EXPECT_THROW(parse_mask("blocks:size=4,rows=\"a/b+;@(,\"\".npy\",columns=c", kShape, open),
               BadMaskNumbers);
  EXPECT_EQ(asked, "a/b+;@(,\".npy");
}

TEST(Words, NameNoFilesWhereNobodyOpensThem) {
  try {
    parse_mask("blocks:size=4,rows=a,columns=b", kShape);
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_THAT(error.what(), HasSubstr("give parse_mask a function"));
  }
}

TEST(Words, AreTakenUpToTheirBounds) {
  EXPECT_EQ(refusal(repeat("(", 64) + "causal" + repeat(")", 64)), "accepted as causal");
  EXPECT_THAT(refusal("full" + repeat("/full", 255)), HasSubstr("accepted as full/full"));
  EXPECT_EQ(refusal("causal@0-1;full@2;sink:1@3"), "accepted as causal@0-1;full@2-2;sink:1@3-3");
}

TEST(Words, ParenthesesSideBySideAreNotNested) {
  EXPECT_THAT(refusal("(full)" + repeat("+(full)", 100)), HasSubstr("accepted as"));
}

TEST(Words, OfABatchImplyItsLengths) {
  const auto lengths = implied_lengths("batch:sequences=3,new=2,levels=1x100:3x7,suffix=2:4:3");
  ASSERT_TRUE(lengths);
  EXPECT_EQ(lengths->queries, 6);
  EXPECT_EQ(lengths->keys, 130);
  for (const char* others : {"causal", "", "batched", "batch:sequences=1+causal", "(batch)"}) {
    EXPECT_FALSE(implied_lengths(others)) << others;
  }
  EXPECT_THROW(implied_lengths("batch"), std::invalid_argument);
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
